//! Heartbeats: a report comes back the same, and a field of a newer node changes nothing.

#![no_main]

use daemon_kit::extract::parse;
use libfuzzer_sys::fuzz_target;
use pool_registry_types::node::Heartbeat;

/// What serialising may add once: the defaults of the report itself.
const DEFAULTS: usize = 128;
/// Of a newer node.
const NEWER: &[u8] = br#"{"later_than_this":[{"depth":[null,1e3,"x"]}],"#;

fuzz_target!(|body: &[u8]| {
    let Some(heartbeat) = fuzz::read_json::<Heartbeat>(body, DEFAULTS) else { return };
    let start = body.iter().position(|byte| *byte == b'{').expect("it is an object");
    let newer = [NEWER, &body[start + 1..]].concat();
    match parse::<Heartbeat>(&newer) {
        Ok(read) => assert_eq!(read, heartbeat, "an unknown field changes the report"),
        Err(error) => panic!("an unknown field is refused: {}", error.0.message),
    }
});
