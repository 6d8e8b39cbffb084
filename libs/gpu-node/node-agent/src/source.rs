//! Where a model comes from, as its operator writes it.

use std::net::IpAddr;
use std::path::PathBuf;

use reqwest::Url;

/// A file on this machine, on a web server, or in a repository of a hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    File(PathBuf),
    /// `https://…`, and `http://…` on this machine only.
    Web(String),
    /// `hf:org/repo`, `hf:org/repo/path/file.gguf`, with `@revision` after the repository.
    Hub {
        repository: String,
        revision: String,
        file: Option<String>,
    },
}

/// Why a text is no source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("source: {text:?} {what}")]
pub struct BadSource {
    text: String,
    what: &'static str,
}

impl ModelSource {
    pub fn parse(text: &str) -> Result<Self, BadSource> {
        let bad = |what| Err(BadSource { text: text.to_owned(), what });
        if text.trim() != text || text.is_empty() || text.chars().any(char::is_control) {
            return bad("is empty, or has white space around it or control characters in it");
        }
        if let Some(path) = text.strip_prefix("file:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if !path.starts_with('/') {
                return bad("must name a whole path after file:");
            }
            return Ok(Self::File(path.into()));
        }
        if text.starts_with("https://") || text.starts_with("http://") {
            let Ok(url) = Url::parse(text) else { return bad("is no URL") };
            if let Err(what) = check_place(&url) {
                return bad(what);
            }
            return match url.path_segments().and_then(|mut parts| parts.next_back()) {
                Some(file) if !file.is_empty() => Ok(Self::Web(url.to_string())),
                _ => bad("must name a file"),
            };
        }
        let Some(rest) = text.strip_prefix("hf:") else { return Ok(Self::File(text.into())) };
        let mut parts = rest.splitn(3, '/');
        let (Some(owner), Some(name)) = (parts.next(), parts.next()) else {
            return bad("must be hf:org/repo or hf:org/repo/file.gguf");
        };
        let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
        let plain = |part: &str| {
            !part.is_empty()
                && part != ".."
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        let file = parts.next().map(str::to_owned);
        if ![owner, name, revision].into_iter().all(plain)
            || file.as_ref().is_some_and(|file| !file.split('/').all(plain))
        {
            return bad("must be hf:org/repo or hf:org/repo/file.gguf, of [A-Za-z0-9._-]");
        }
        Ok(Self::Hub { repository: format!("{owner}/{name}"), revision: revision.to_owned(), file })
    }
}

/// Whether a file may be read there: by `https://`, or of this machine. The error says why not.
pub(crate) fn check_place(url: &Url) -> Result<(), &'static str> {
    let host = url.host_str().unwrap_or_default();
    let ip = host.trim_matches(['[', ']']).parse::<IpAddr>().ok().map(|ip| ip.to_canonical());
    let is_link_local = ip.is_some_and(|ip| match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    });
    if is_link_local {
        return Err("must not name a link-local address: what answers there is no server of files");
    }
    let is_here = ip.is_some_and(|ip| ip.is_loopback()) || host == "localhost";
    if url.scheme() != "https" && !(url.scheme() == "http" && is_here) {
        return Err("must be https://: what comes over plain http:// may be anybody's");
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("must not hold a name or a password");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2462
    #[test]
    fn a_source_is_a_file_a_web_address_or_a_place_on_the_hub() {
        let parse = |text: &str| ModelSource::parse(text);
        assert_eq!(parse("models/a.gguf"), Ok(ModelSource::File("models/a.gguf".into())));
        assert_eq!(parse("file:///m/a.gguf"), Ok(ModelSource::File("/m/a.gguf".into())));
        assert_eq!(parse("file:/m/a.gguf"), Ok(ModelSource::File("/m/a.gguf".into())));
        assert!(matches!(parse("https://host/a.gguf"), Ok(ModelSource::Web(_))));
        assert!(matches!(parse("http://127.0.0.1:8/a.gguf"), Ok(ModelSource::Web(_))));
        let hub = |revision: &str, file: Option<&str>| {
            Ok(ModelSource::Hub {
                repository: "org/repo".into(),
                revision: revision.into(),
                file: file.map(str::to_owned),
            })
        };
        assert_eq!(parse("hf:org/repo"), hub("main", None));
        assert_eq!(parse("hf:org/repo@v1/q/a.gguf"), hub("v1", Some("q/a.gguf")));
        for bad in [
            "",
            " a",
            "file:a",
            "http://host/a.gguf",
            "https://u:p@host/a",
            "https://169.254.169.254/a",
            "https://[fe80::1]/a",
            "https://[::ffff:169.254.1.1]/a",
            "https://host/",
            "hf:org",
            "hf:o/r/../x",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
