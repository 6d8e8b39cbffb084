//! By which names a daemon without tokens may be called, besides this machine's own.
//!
//! A page in a browser can have a name of its site point here; it then calls by that name, and only by
//! that is it known. A name that somebody has written down is one that they own.

use crate::config;

/// Longest name of a host, and of one part of it. Source: RFC 1035, 2.3.4.
const MAX_NAME_BYTES: usize = 253;
const MAX_LABEL_BYTES: usize = 63;

/// The names, and what sets them.
#[derive(Debug, Clone, Default)]
pub struct AllowedHosts {
    /// The variables of names, and of origins whose pages may call; absent where the daemon has none.
    settings: Option<[&'static str; 2]>,
    names: Vec<String>,
}

/// Why a text is no name of a host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no name of a host, as host.docker.internal: without a scheme, a port or a wildcard")]
pub struct HostError(String);

impl AllowedHosts {
    /// Names or addresses, comma-separated. `settings`: the variables of them and of origins.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn parse(settings: [&'static str; 2], list: &str) -> Result<Self, HostError> {
        let name = |text: &str| {
            if is_name(text) { Ok(text.to_ascii_lowercase()) } else { Err(HostError(text.to_owned())) }
        };
        let names = list.split(',').map(str::trim).filter(|text| !text.is_empty()).map(name);
        Ok(Self { settings: Some(settings), names: names.collect::<Result<_, _>>()? })
    }

    /// Whether a host, with or without a port, is this machine or one of the names.
    pub(crate) fn has(&self, authority: &str) -> bool {
        if config::is_this_machine(authority) {
            return true;
        }
        let Ok(authority) = authority.parse::<axum::http::uri::Authority>() else { return false };
        self.names.iter().any(|name| name.eq_ignore_ascii_case(authority.host()))
    }

    /// What whoever calls by another name is told.
    pub(crate) fn refusal_of_host(&self) -> String {
        let names = self.settings.map_or_else(String::new, |[names, _]| format!(" or one of {names}"));
        format!("without tokens only this machine may call, by its own name{names}: {}", self.remedy(0))
    }

    /// What a page of another origin is told.
    pub(crate) fn refusal_of_page(&self) -> String {
        format!("without tokens pages of other origins may not call: {}", self.remedy(1))
    }

    fn remedy(&self, of: usize) -> String {
        let other = self.settings.map_or_else(String::new, |settings| format!("{}, or ", settings[of]));
        format!("set {other}LLORCH_API_TOKEN")
    }
}

fn is_name(text: &str) -> bool {
    if text.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok() {
        // As a header has it: version 6 in brackets.
        return text.parse::<std::net::Ipv4Addr>().is_ok() || text.starts_with('[') && text.ends_with(']');
    }
    let is_label = |label: &str| {
        let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        (1..=MAX_LABEL_BYTES).contains(&label.len())
            && label.bytes().all(is_inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= MAX_NAME_BYTES && text.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: [&str; 2] = ["THE_HOSTS", "THE_ORIGINS"];

    // CLOUD-2884
    #[test]
    fn a_name_that_is_written_down_is_let_in_whatever_its_port_and_no_other() {
        let hosts =
            AllowedHosts::parse(SETTINGS, "host.docker.internal, LLM.lan ,10.0.0.5,[fd00::1],").unwrap();
        for known in [
            "host.docker.internal",
            "host.docker.internal:8080",
            "Host.Docker.Internal:1",
            "llm.lan:80",
            "10.0.0.5:8080",
            "[fd00::1]:8080",
            "localhost:8080",
            "127.0.0.1",
            "[::1]:8080",
        ] {
            assert!(hosts.has(known), "{known}");
        }
        for other in
            ["docker.internal", "a.llm.lan", "llm.lan.", "llm.lan.evil.example", "llm.la", "10.0.0.50", ""]
        {
            assert!(!hosts.has(other), "{other}");
        }
        assert!(!AllowedHosts::default().has("llm.lan") && AllowedHosts::default().has("localhost"));
        assert!(hosts.refusal_of_host().contains("THE_HOSTS"), "{}", hosts.refusal_of_host());
        assert!(hosts.refusal_of_page().contains("THE_ORIGINS"), "{}", hosts.refusal_of_page());
        assert_eq!(
            AllowedHosts::default().refusal_of_host(),
            "without tokens only this machine may call, by its own name: set LLORCH_API_TOKEN"
        );
    }

    // CLOUD-2884
    #[test]
    fn what_is_no_name_of_a_host_is_refused_and_shown() {
        let long = "a".repeat(64);
        for wrong in [
            "*",
            "*.lan",
            "llm.lan:8080",
            "http://llm.lan",
            "llm..lan",
            ".lan",
            "lan.",
            "a b",
            "-a",
            "a/b",
            "u@llm.lan",
            "fd00::1",
            "[llm]",
            &long,
        ] {
            let error = AllowedHosts::parse(SETTINGS, &format!("fine.lan,{wrong}")).unwrap_err();
            assert_eq!(error, HostError(wrong.to_owned()));
        }
    }
}
