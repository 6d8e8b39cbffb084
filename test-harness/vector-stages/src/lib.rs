//! The stages of `deploy/vector/vector.toml`, compiled and run by Vector's own language over lines that the
//! daemons have written (`recorded.jsonl`; a journey looks that they still write such). Nothing else of Vector
//! is here: its sources and its way to Loki are not run.

use serde_json::{Value as Json, json};
use vrl::compiler::state::RuntimeState;
use vrl::compiler::{Context, TargetValue, TimeZone, compile};
use vrl::value::{Secrets, Value};

const CONFIG: &str = include_str!("../../../deploy/vector/vector.toml");

/// The program of its one transform.
fn program() -> &'static str {
    let (_, rest) = CONFIG.split_once("source = '''\n").expect("a transform with a program");
    let (program, rest) = rest.split_once("'''").expect("its end");
    assert!(!rest.contains("source = '''"), "there is one");
    program
}

/// What becomes of an event, as JSON.
pub fn run(event: Json) -> Json {
    let compiled = compile(program(), &vrl::stdlib::all()).unwrap_or_else(|errors| panic!("{errors:?}"));
    assert!(compiled.warnings.is_empty(), "{:?}", compiled.warnings);
    let (metadata, secrets) = (Value::from(json!({})), Secrets::default());
    let mut target = TargetValue { value: Value::from(event), metadata, secrets };
    let (mut state, zone) = (RuntimeState::default(), TimeZone::default());
    let outcome = compiled.program.resolve(&mut Context::new(&mut target, &mut state, &zone));
    outcome.unwrap_or_else(|error| panic!("{error:?}"));
    serde_json::to_value(target.value).expect("JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the journal's source hands it over.
    fn of_journal(line: &str, unit: &str) -> Json {
        run(json!({"message": line, "_SYSTEMD_UNIT": unit, "host": "gpu-7"}))
    }

    #[test]
    fn a_recorded_line_is_found_by_its_level_and_its_ids_and_goes_on_as_it_was() {
        let recorded = include_str!("../recorded.jsonl");
        let mut with_task = 0;
        for line in recorded.lines() {
            let written: Json = serde_json::from_str(line).expect("a recorded line");
            let event = of_journal(line, "pool-managerd.service");
            assert_eq!(event["message"], line, "nothing of it is lost");
            let labels = ["daemon", "host", "level"].map(|label| &event[label]);
            assert_eq!(labels, [&json!("pool-managerd"), &json!("gpu-7"), &written["level"]]);
            let cut = |time: &Json| time.as_str().expect("a time")[..23].to_owned();
            assert_eq!(cut(&event["timestamp"]), cut(&written["timestamp"]));
            let ids = event["ids"].as_object().expect("ids");
            for name in ["task_id", "attempt_id", "trace_id", "correlation_id", "node_id", "pool_id", "code"]
            {
                assert_eq!(ids.get(name), written.get(name), "{name} of {line}");
            }
            with_task += usize::from(ids.contains_key("task_id"));
        }
        assert!(recorded.lines().count() >= 8 && with_task >= 2, "{with_task}");
    }

    #[test]
    fn what_is_no_line_of_ours_goes_on_as_text() {
        for line in
            ["thread 'main' panicked at src/main.rs:7", "{\"a\": 1}", "[1, 2]", "null", "{", "", "\"x\""]
        {
            let event = of_journal(line, "orchestratord.service");
            assert_eq!((&event["message"], &event["level"]), (&json!(line), &json!("UNKNOWN")), "{line}");
            assert_eq!((&event["daemon"], &event["ids"]), (&json!("orchestratord"), &json!({})));
        }
        let of_file = run(json!({"message": "x", "file": "/var/log/llama-orch/orchestratord.log"}));
        assert_eq!((&of_file["daemon"], &of_file["host"]), (&json!("orchestratord"), &json!("")));
        assert_eq!(run(json!({"message": "x"}))["daemon"], "unknown");
        let odd = r#"{"message": "x", "level": 7, "timestamp": "yesterday", "task_id": null}"#;
        assert_eq!(
            (&of_journal(odd, "")["level"], &of_journal(odd, "")["ids"]),
            (&json!("UNKNOWN"), &json!({}))
        );
    }
}
