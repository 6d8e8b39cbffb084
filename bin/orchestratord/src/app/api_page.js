// Starts the API browser. The token stays in this tab and is sent with every request.
const kept = "llorch-token";
async function openApi() {
  const ask = async () => {
    const token = sessionStorage.getItem(kept);
    return fetch("/openapi.json", token ? { headers: { Authorization: `Bearer ${token}` } } : {});
  };
  let answer = await ask();
  while (answer.status === 401) {
    const token = window.prompt("Token of this cluster (LLORCH_API_TOKEN):");
    if (token === null) break;
    sessionStorage.setItem(kept, token.trim());
    answer = await ask();
  }
  return fillIn(await answer.json());
}
// What can be tried out names a model of this cluster, where it has one.
async function fillIn(spec) {
  const token = sessionStorage.getItem(kept);
  try {
    const answer = await fetch("/v1/models", token ? { headers: { Authorization: `Bearer ${token}` } } : {});
    const model = (await answer.json()).data[0].id;
    return JSON.parse(JSON.stringify(spec).replaceAll('"smollm2-135m"', () => JSON.stringify(model)));
  } catch {
    return spec;
  }
}
window.onload = async () => {
  window.ui = SwaggerUIBundle({
    spec: await openApi(),
    dom_id: "#swagger-ui",
    deepLinking: true,
    presets: [SwaggerUIBundle.presets.apis],
    requestInterceptor: (request) => {
      const token = sessionStorage.getItem(kept);
      if (token) request.headers.Authorization = `Bearer ${token}`;
      return request;
    },
  });
};
