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
  return answer.json();
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
