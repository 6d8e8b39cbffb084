//! Handoff files: what binds has valid ids and the address of a host that is allowed, read by the
//! same rules as the client that will call it.

#![no_main]

use handoff_watcher::EngineHosts;
use handoff_watcher::handoff::{Handoff, MAX_SLOTS, parse};
use libfuzzer_sys::fuzz_target;
use pool_registry_types::{PoolId, ReplicaId};
use serde_json::Value;
use url::Url;

const LOCAL: &[&str] = &["127.0.0.1", "localhost", "[::1]"];
const OTHERS: &[&str] = &["gpu-box", "10.0.0.5", "[fd00::5]"];

/// What the file must be called, if it says who it is.
fn stem(content: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(content).ok()?;
    let pool = value.get("pool_id").or_else(|| value.get(0))?.as_str()?;
    let replica = value.get("replica_id").or_else(|| value.get(1))?.as_str()?;
    Some(format!("{pool}-{replica}"))
}

fn check(handoff: &Handoff, stem: &str, hosts: &[&str]) {
    assert_eq!(handoff.name().to_string(), stem);
    assert!(
        PoolId::new(handoff.pool_id.as_str()).is_ok() && ReplicaId::new(handoff.replica_id.as_str()).is_ok()
    );
    assert!(!stem.contains(['/', '\0']) && !stem.starts_with('.'), "{stem:?} leaves the directory");
    assert!(handoff.slots.is_none_or(|slots| (1..=MAX_SLOTS).contains(&slots)));
    assert_ne!(handoff.ctx_max, Some(0));
    let names = handoff.model_names();
    let twice = names.iter().enumerate().find(|(n, name)| names[..*n].contains(name));
    assert_eq!(twice, None, "a model is named twice");
    for path in ["", "/health"] {
        let text = format!("{}{path}", handoff.url);
        let url = Url::parse(&text).unwrap_or_else(|error| panic!("{text:?} is no URL: {error}"));
        assert!(matches!(url.scheme(), "http" | "https"), "{url}");
        assert!(url.host_str().is_some_and(|host| hosts.contains(&host)), "{text:?} leads to {url}");
        assert!(url.username().is_empty() && url.password().is_none(), "{text:?} holds credentials");
        assert!(url.query().is_none() && url.fragment().is_none(), "{text:?} holds more than a path");
        assert_ne!(url.port(), Some(0));
        assert!(url.path().ends_with(path), "{text:?} leads to {url}");
    }
}

fuzz_target!(|content: &[u8]| {
    let stem = stem(content).unwrap_or_default();
    for hosts in [LOCAL, OTHERS] {
        let allowed = EngineHosts::parse(&hosts.join(" , "));
        let Ok(handoff) = parse(&stem, content, &allowed) else { continue };
        check(&handoff, &stem, hosts);
        assert!(parse(&format!("{stem}0"), content, &allowed).is_err(), "under another name");
        assert!(parse(&stem, content, &EngineHosts::parse("")).is_err(), "no host is allowed");
        // The address is in its final form.
        let mut value: Value = serde_json::from_slice(content).expect("it was read before");
        let Some(object) = value.as_object_mut() else { panic!("a handoff that is no object was taken") };
        object.insert("url".to_owned(), handoff.url.clone().into());
        let again = parse(&stem, value.to_string().as_bytes(), &allowed);
        assert_eq!(again.as_ref(), Ok(&handoff), "read again it is another one");
    }
});
