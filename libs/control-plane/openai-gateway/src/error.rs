//! Our errors in the shapes that clients of the two APIs know: one table.
//!
//! SDKs act on the status and on `x-should-retry`, people read the message, programs the code. What
//! has no row in the contract has the row of its status. The idea needed to read it: a retry by the
//! client multiplies the tries that were made here, so it is asked for only where it may help.

use std::time::Duration;

use bytes::Bytes;
use pool_registry_types::{ErrorBody, ErrorCode};
use serde_json::{Value, json};
use task_stream::{ApiDialect, OpenAiRoute};

/// Longest time to wait that a client is asked for, seconds. Source: .specs/01 CLOUD-2808.
const LONGEST_WAIT_SECS: u64 = 120;

/// How an error of ours stands in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorShape {
    pub status: u16,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// OpenAI's `code` where it has one, else ours.
    pub code: &'static str,
    /// Anthropic's `type`.
    pub anthropic: &'static str,
}

const INVALID: &str = "invalid_request_error";

/// The table. Source: .specs/01 CLOUD-2807.
pub fn shape(code: ErrorCode) -> ErrorShape {
    let ours = code.as_str();
    let row = |status, kind, code, anthropic| ErrorShape { status, kind, code, anthropic };
    match code {
        ErrorCode::MissingToken | ErrorCode::BadToken => {
            row(401, INVALID, "invalid_api_key", "authentication_error")
        }
        ErrorCode::Forbidden => row(403, "permission_error", "insufficient_permissions", "permission_error"),
        ErrorCode::InvalidParams | ErrorCode::Unsupported => row(400, INVALID, ours, INVALID),
        ErrorCode::ContextTooLong => row(400, INVALID, "context_length_exceeded", INVALID),
        ErrorCode::ModelNotAvailable => row(404, INVALID, "model_not_found", "not_found_error"),
        ErrorCode::NotFound | ErrorCode::NodeUnknown => row(404, INVALID, ours, "not_found_error"),
        ErrorCode::MethodNotAllowed
        | ErrorCode::NodeIdConflict
        | ErrorCode::TaskConflict
        | ErrorCode::WrongNode
        | ErrorCode::StaleLink
        | ErrorCode::AttemptDuplicate
        | ErrorCode::EventsExpired
        | ErrorCode::PoolAmbiguous
        | ErrorCode::Canceled => row(code.http_status(), INVALID, ours, INVALID),
        ErrorCode::PayloadTooLarge => row(413, INVALID, ours, "request_too_large"),
        ErrorCode::AdmissionReject
        | ErrorCode::RateLimited
        | ErrorCode::BudgetExceeded
        | ErrorCode::QueueFullDropLru => {
            row(429, "rate_limit_error", "rate_limit_exceeded", "rate_limit_error")
        }
        ErrorCode::NodeUnavailable
        | ErrorCode::PoolUnready
        | ErrorCode::PoolUnavailable
        | ErrorCode::ReplicaExhausted
        | ErrorCode::CloudProfileDisabled
        | ErrorCode::Overloaded
        | ErrorCode::Draining => row(503, "server_error", ours, "overloaded_error"),
        ErrorCode::DeadlineExceeded | ErrorCode::DecodeTimeout => {
            row(504, "timeout_error", ours, "timeout_error")
        }
        ErrorCode::WorkerReset => row(code.http_status(), "server_error", ours, "overloaded_error"),
        ErrorCode::Internal | ErrorCode::Unknown => {
            row(code.http_status(), "server_error", ours, "api_error")
        }
    }
}

/// `x-should-retry`, where the SDKs are to be held back. They try 409, 429 and all from 500 on again:
/// after a deadline or the last of our tries they would do all of it once more, and what is not
/// retriable stays as it is. Source: .specs/01 CLOUD-2808.
pub fn should_retry(error: &ErrorBody) -> Option<bool> {
    let is_spent = matches!(
        error.code,
        ErrorCode::DeadlineExceeded | ErrorCode::DecodeTimeout | ErrorCode::PoolUnavailable
    );
    let tried_again = matches!(shape(error.code).status, 409 | 429 | 500..);
    (is_spent || tried_again && !error.retriable).then_some(false)
}

/// How long a client is asked to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryWait {
    /// `Retry-After`, seconds.
    pub seconds: u64,
    /// `X-Backoff-Ms`, milliseconds.
    pub millis: u64,
}

/// What `Retry-After` and `X-Backoff-Ms` say, on answers with 429 and 503. Source: .specs/01
/// CLOUD-2808.
pub fn retry_wait(error: &ErrorBody) -> Option<RetryWait> {
    if !matches!(shape(error.code).status, 429 | 503) {
        return None;
    }
    let longest = Duration::from_secs(LONGEST_WAIT_SECS);
    let wait = error.retry_after_ms.map_or(Duration::from_secs(1), Duration::from_millis).min(longest);
    let millis = wait.as_secs() * 1000 + u64::from(wait.subsec_millis());
    Some(RetryWait { seconds: millis.div_ceil(1000).max(1), millis })
}

/// The body of a failing answer. `param` is the field at fault.
pub fn body(dialect: ApiDialect, error: &ErrorBody, param: Option<&str>) -> Bytes {
    object(dialect, error, param).to_string().into()
}

fn object(dialect: ApiDialect, error: &ErrorBody, param: Option<&str>) -> Value {
    let shape = shape(error.code);
    match dialect {
        ApiDialect::OpenAi => json!({"error": openai(error, param)}),
        ApiDialect::Anthropic => {
            json!({"type": "error", "error": {"type": shape.anthropic, "message": error.message}})
        }
    }
}

fn openai(error: &ErrorBody, param: Option<&str>) -> Value {
    let shape = shape(error.code);
    json!({"message": error.message, "type": shape.kind, "param": param, "code": shape.code})
}

/// The one event that ends a stream of `route` by an error of ours. `passed` is the number of events
/// before it, which streams of `/v1/responses` are numbered by.
pub fn event(route: OpenAiRoute, error: &ErrorBody, passed: u64) -> Bytes {
    let data = match route {
        // Readers of this API look for `error`, or for the type and the fields beside it.
        OpenAiRoute::Responses => json!({
            "type": "error",
            "sequence_number": passed,
            "code": shape(error.code).code,
            "message": error.message,
            "param": null,
            "error": openai(error, None),
        }),
        _ => object(route.dialect(), error, None),
    };
    event_of(route, &data.to_string())
}

/// The one event for an answer of an engine's that is not 2xx, after ours was: its `error` object as
/// it came, or else what its text says.
pub fn engine_event(route: OpenAiRoute, answer: &[u8], passed: u64) -> Bytes {
    let read = std::str::from_utf8(answer).ok();
    let compact = read.and_then(|text| serde_json::from_str::<WithError<'_>>(text).ok());
    match compact {
        // On one line, since each line of an event has to begin with its field's name.
        Some(with_error) if !with_error.error.get().contains(['\n', '\r']) => {
            let error = with_error.error.get();
            let data = match route {
                OpenAiRoute::Responses => {
                    format!(r#"{{"type":"error","sequence_number":{passed},"error":{error}}}"#)
                }
                _ if route.dialect() == ApiDialect::Anthropic => {
                    format!(r#"{{"type":"error","error":{error}}}"#)
                }
                _ => format!(r#"{{"error":{error}}}"#),
            };
            event_of(route, &data)
        }
        Some(with_error) => {
            let value = serde_json::from_str(with_error.error.get()).unwrap_or(Value::Null);
            let answer = json!({ "error": value }).to_string();
            engine_event(route, answer.as_bytes(), passed)
        }
        None => {
            let text = String::from_utf8_lossy(&answer[..answer.len().min(LONGEST_QUOTED)]);
            let message = format!("the engine refused the request: {}", text.trim());
            event(route, &ErrorBody::new(ErrorCode::Internal, message), passed)
        }
    }
}

/// Of an engine's answer that is no error of either API so much is quoted, bytes.
const LONGEST_QUOTED: usize = 1024;

#[derive(serde::Deserialize)]
struct WithError<'a> {
    #[serde(borrow)]
    error: &'a serde_json::value::RawValue,
}

fn event_of(route: OpenAiRoute, data: &str) -> Bytes {
    let name = match route {
        OpenAiRoute::Messages | OpenAiRoute::Responses => "event: error\n",
        _ => "",
    };
    format!("{name}data: {data}\n\n").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(code: ErrorCode) -> ErrorBody {
        ErrorBody::new(code, "why \"so\"")
    }

    fn data(event: &Bytes) -> (Option<String>, Value) {
        let text = std::str::from_utf8(event).unwrap();
        let body = text.strip_suffix("\n\n").unwrap();
        let name = body.split_once('\n').map(|(name, _)| name.strip_prefix("event: ").unwrap().to_owned());
        let data = body.lines().last().unwrap().strip_prefix("data: ").unwrap();
        assert_eq!(body.lines().count(), 1 + usize::from(name.is_some()));
        (name, serde_json::from_str(data).unwrap())
    }

    // CLOUD-2807
    #[test]
    fn each_code_has_the_row_of_the_contract() {
        for (code, status, kind, name, anthropic) in [
            (ErrorCode::MissingToken, 401, INVALID, "invalid_api_key", "authentication_error"),
            (ErrorCode::BadToken, 401, INVALID, "invalid_api_key", "authentication_error"),
            (ErrorCode::Forbidden, 403, "permission_error", "insufficient_permissions", "permission_error"),
            (ErrorCode::InvalidParams, 400, INVALID, "INVALID_PARAMS", INVALID),
            (ErrorCode::Unsupported, 400, INVALID, "UNSUPPORTED", INVALID),
            (ErrorCode::ContextTooLong, 400, INVALID, "context_length_exceeded", INVALID),
            (ErrorCode::ModelNotAvailable, 404, INVALID, "model_not_found", "not_found_error"),
            (ErrorCode::PayloadTooLarge, 413, INVALID, "PAYLOAD_TOO_LARGE", "request_too_large"),
            (ErrorCode::RateLimited, 429, "rate_limit_error", "rate_limit_exceeded", "rate_limit_error"),
            (ErrorCode::BudgetExceeded, 429, "rate_limit_error", "rate_limit_exceeded", "rate_limit_error"),
            (ErrorCode::NodeUnavailable, 503, "server_error", "NODE_UNAVAILABLE", "overloaded_error"),
            (ErrorCode::Draining, 503, "server_error", "DRAINING", "overloaded_error"),
            (ErrorCode::DeadlineExceeded, 504, "timeout_error", "DEADLINE_EXCEEDED", "timeout_error"),
            (ErrorCode::WorkerReset, 502, "server_error", "WORKER_RESET", "overloaded_error"),
            (ErrorCode::TaskConflict, 409, INVALID, "TASK_CONFLICT", INVALID),
        ] {
            assert_eq!(shape(code), ErrorShape { status, kind, code: name, anthropic }, "{code}");
        }
        for code in ErrorCode::ALL {
            let only_here = *code == ErrorCode::ModelNotAvailable;
            assert!(only_here || shape(*code).status == code.http_status(), "{code}");
        }
    }

    // CLOUD-2807
    #[test]
    fn a_body_has_the_shape_of_its_dialect() {
        let error = error(ErrorCode::ContextTooLong);
        let body = |dialect, param| serde_json::from_slice::<Value>(&body(dialect, &error, param)).unwrap();
        let openai = json!({"error": {"message": "why \"so\"", "type": "invalid_request_error",
            "param": "messages", "code": "context_length_exceeded"}});
        assert_eq!(body(ApiDialect::OpenAi, Some("messages")), openai);
        assert!(body(ApiDialect::OpenAi, None)["error"]["param"].is_null());
        let anthropic =
            json!({"type": "error", "error": {"type": "invalid_request_error", "message": "why \"so\""}});
        assert_eq!(body(ApiDialect::Anthropic, Some("messages")), anthropic);
    }

    // CLOUD-2809
    #[test]
    fn an_event_has_the_shape_of_its_route() {
        let error = error(ErrorCode::WorkerReset);
        let openai =
            json!({"message": "why \"so\"", "type": "server_error", "param": null, "code": "WORKER_RESET"});
        for route in [OpenAiRoute::ChatCompletions, OpenAiRoute::Completions] {
            assert_eq!(data(&event(route, &error, 4)), (None, json!({"error": openai})));
        }
        let anthropic =
            json!({"type": "error", "error": {"type": "overloaded_error", "message": "why \"so\""}});
        assert_eq!(data(&event(OpenAiRoute::Messages, &error, 4)), (Some("error".to_owned()), anthropic));
        let responses = json!({"type": "error", "sequence_number": 4, "code": "WORKER_RESET",
            "message": "why \"so\"", "param": null, "error": openai});
        assert_eq!(data(&event(OpenAiRoute::Responses, &error, 4)), (Some("error".to_owned()), responses));
    }

    // CLOUD-2809
    #[test]
    fn an_engines_error_object_passes_as_it_came() {
        let answer = br#" {"error" : {"message":"no","code":400.0,"n":1e2}, "more":1}"#;
        assert_eq!(
            engine_event(OpenAiRoute::ChatCompletions, answer, 0),
            "data: {\"error\":{\"message\":\"no\",\"code\":400.0,\"n\":1e2}}\n\n"
        );
        assert_eq!(
            engine_event(OpenAiRoute::Messages, answer, 0),
            "event: error\ndata: {\"type\":\"error\",\"error\":{\"message\":\"no\",\"code\":400.0,\"n\":1e2}}\n\n"
        );
        let lines = b"{\"error\":{\n\"message\":\"no\"}}";
        assert_eq!(
            engine_event(OpenAiRoute::Responses, lines, 7),
            "event: error\ndata: {\"type\":\"error\",\"sequence_number\":7,\"error\":{\"message\":\"no\"}}\n\n"
        );
        let (_, plain) = data(&engine_event(OpenAiRoute::Completions, b"<h1>\nBad \xff</h1>", 0));
        assert!(plain["error"]["message"].as_str().unwrap().contains("<h1>\nBad \u{fffd}</h1>"), "{plain}");
    }

    // CLOUD-2808
    #[test]
    fn only_what_may_help_is_tried_again() {
        for code in [ErrorCode::DeadlineExceeded, ErrorCode::DecodeTimeout, ErrorCode::PoolUnavailable] {
            assert_eq!(should_retry(&error(code)), Some(false), "{code}");
        }
        for code in [ErrorCode::BudgetExceeded, ErrorCode::TaskConflict, ErrorCode::Internal] {
            assert_eq!(should_retry(&error(code)), Some(false), "{code}");
        }
        for code in [ErrorCode::AdmissionReject, ErrorCode::Draining, ErrorCode::InvalidParams] {
            assert_eq!(should_retry(&error(code)), None, "{code}");
        }
    }

    // CLOUD-2808
    #[test]
    fn a_wait_is_one_to_120_whole_seconds() {
        let wait = |millis| retry_wait(&error(ErrorCode::RateLimited).retry_after_ms(millis));
        assert_eq!(wait(0), Some(RetryWait { seconds: 1, millis: 0 }));
        assert_eq!(wait(1001), Some(RetryWait { seconds: 2, millis: 1001 }));
        assert_eq!(wait(u64::MAX), Some(RetryWait { seconds: 120, millis: 120_000 }));
        assert_eq!(retry_wait(&error(ErrorCode::Overloaded)), Some(RetryWait { seconds: 1, millis: 1000 }));
        assert_eq!(retry_wait(&error(ErrorCode::DeadlineExceeded)), None);
    }
}
