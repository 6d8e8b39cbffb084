//! What an OpenAPI document says of every operation alike: the token, the headers, the codes of
//! those who may not; and what the derives of its types cannot say.

use axum::http::Method;
use pool_registry_types::routes::headers;
use pool_registry_types::task::MAX_INPUTS;
use serde_json::{Map, Value, json};

use crate::auth::{self, Need, Needs};
use crate::tokens::Scope;

/// Completes the document of a daemon. `needs` is what its gate decides by.
///
/// # Panics
/// If it is no OpenAPI document: it is made by this program.
pub fn finish(mut document: Value, needs: Needs) -> Value {
    unsigned(&mut document);
    // utoipa passes over `deny_unknown_fields` and bounds on an enum's forms.
    for form in list(&mut document["components"]["schemas"]["Inputs"]["oneOf"]) {
        form["additionalProperties"] = json!(false);
        if let Some(texts) = form.pointer_mut("/properties/embedding") {
            texts["items"] = json!({"$ref": "#/components/schemas/NonEmptyText"});
            (texts["minItems"], texts["maxItems"]) = (json!(1), json!(MAX_INPUTS));
        }
    }
    document["components"]["securitySchemes"] = json!({"token": {"type": "http", "scheme": "bearer"}});
    document["security"] = json!([{"token": []}]);
    let paths = document["paths"].as_object_mut().expect("a document has paths");
    for (path, item) in paths {
        for (method, operation) in item.as_object_mut().expect("a path has operations") {
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).expect("a method");
            let need = if auth::is_open(path) { Need::Open } else { needs(&method, path) };
            complete(operation, need, if theirs(path) { "GatewayError" } else { "ErrorBody" });
        }
    }
    document
}

fn list(value: &mut Value) -> &mut [Value] {
    value.as_array_mut().map_or(&mut [], Vec::as_mut_slice)
}

/// Whether the path is of another API, whose errors have another shape.
fn theirs(path: &str) -> bool {
    path.starts_with("/v1/") || ["/tokenize", "/detokenize", "/apply-template"].contains(&path)
}

/// `error`: the schema of its errors.
fn complete(operation: &mut Value, need: Need, error: &str) {
    if let Some(parameters) = operation.get_mut("parameters") {
        list(parameters).iter_mut().for_each(not_null);
    }
    if need == Need::Open {
        operation["security"] = json!([]);
    }
    let has_body = operation.get("requestBody").is_some();
    let responses = operation["responses"].as_object_mut().expect("an operation has answers");
    let mut refuse = |status: &str, why: &str| {
        let body = json!({"application/json": {"schema": {"$ref": format!("#/components/schemas/{error}")}}});
        responses.entry(status).or_insert(json!({"description": why, "content": body}));
    };
    if need != Need::Open {
        refuse("401", "no token, or one that is not known");
    }
    if !need.scopes().is_empty() {
        refuse("403", "the token may not do this");
    }
    if need.scopes().contains(&Scope::Client) {
        refuse("429", "the token asks too much");
    }
    if has_body {
        refuse("415", "the body has a content encoding that is not taken");
    }
    for (status, response) in responses {
        let headers = response.as_object_mut().expect("an answer").entry("headers");
        let headers = headers.or_insert(json!({})).as_object_mut().expect("headers");
        add_headers(status, headers);
    }
}

fn add_headers(status: &str, all: &mut Map<String, Value>) {
    let mut add = |name: &str, required: bool, schema: Value| {
        all.insert(name.to_owned(), json!({"required": required, "schema": schema}));
    };
    add(headers::CORRELATION_ID, true, json!({"type": "string", "minLength": 1, "maxLength": 128}));
    add(headers::TRACE_ID, true, json!({"type": "string", "pattern": "^[0-9a-fA-F]{32}$"}));
    match status {
        "401" => add("www-authenticate", true, json!({"type": "string", "enum": ["Bearer"]})),
        "415" => add("accept-encoding", true, json!({"type": "string", "enum": ["identity"]})),
        "429" => {
            add("retry-after", false, json!({"type": "integer", "minimum": 0}));
            add(headers::BACKOFF_MS, false, json!({"type": "integer", "minimum": 0}));
        }
        _ => {}
    }
}

/// A parameter that is absent is absent; the word `null` is a text.
fn not_null(parameter: &mut Value) {
    let Some(kind) = parameter.pointer_mut("/schema/type") else { return };
    let Some(kinds) = kind.as_array_mut() else { return };
    kinds.retain(|kind| kind != "null");
    if let [only] = kinds.as_slice() {
        *kind = only.clone();
    }
}

/// utoipa has the formats of signed numbers for unsigned ones.
fn unsigned(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(unsigned),
        Value::Object(fields) => {
            let is_integer = match fields.get("type") {
                Some(Value::String(kind)) => kind == "integer",
                Some(Value::Array(kinds)) => kinds.iter().any(|kind| kind == "integer"),
                _ => false,
            };
            if is_integer && fields.contains_key("minimum") {
                let most = match fields.remove("format") {
                    Some(Value::String(format)) if format == "int32" => u64::from(u32::MAX),
                    _ => u64::MAX,
                };
                fields.entry("maximum").or_insert(json!(most));
            }
            fields.values_mut().for_each(unsigned);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-1107
    #[test]
    fn every_operation_says_who_may_call_and_numbers_say_how_large_they_are() {
        let operation = || {
            json!({
                "parameters": [{"name": "n", "schema": {"type": ["integer", "null"], "format": "int32", "minimum": 0}}],
                "responses": {"200": {"description": "fine"}},
            })
        };
        let mut with_body = operation();
        with_body["requestBody"] = json!({});
        let document = json!({
            "paths": {"/health/live": {"get": operation()}, "/v2/tasks": {"post": with_body}},
            "components": {"schemas": {"Inputs": {"oneOf": [{"type": "object"}]}}},
        });
        let done = finish(document, |_, _| Need::Scope(Scope::Client));
        let (open, closed) = (&done["paths"]["/health/live"]["get"], &done["paths"]["/v2/tasks"]["post"]);
        assert_eq!((&open["security"], closed.get("security")), (&json!([]), None));
        let codes = |of: &Value| of["responses"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(
            (codes(open), codes(closed)),
            (vec!["200".to_owned()], ["200", "401", "403", "415", "429"].map(str::to_owned).to_vec())
        );
        let number = &closed["parameters"][0]["schema"];
        assert_eq!(*number, json!({"type": "integer", "minimum": 0, "maximum": u32::MAX}));
        assert_eq!(done["components"]["schemas"]["Inputs"]["oneOf"][0]["additionalProperties"], false);
        assert_eq!(closed["responses"]["401"]["headers"]["www-authenticate"]["required"], true);
        assert_eq!(closed["responses"]["415"]["headers"]["accept-encoding"]["required"], true);
    }
}
