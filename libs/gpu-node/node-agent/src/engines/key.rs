//! The key that an engine asks for.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use http::HeaderValue;

/// Longest key, bytes.
const MAX_BYTES: u64 = 4096;

/// Why a file gives no key. Names the file and never shows what is in it.
#[derive(Debug, thiserror::Error)]
#[error("api_key_file: {}: {why}", path.display())]
pub(crate) struct KeyError {
    pub path: PathBuf,
    pub why: NoKey,
}

/// What is wrong with a file of a key.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoKey {
    #[error("{0}")]
    Unreadable(io::Error),
    #[error("is no regular file")]
    NoFile,
    #[error("must hold one key of visible ASCII, at most 4,096 bytes")]
    Malformed,
}

/// What is sent as bearer token to one engine. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct ApiKey(HeaderValue);

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

impl ApiKey {
    /// The key that the file holds: one line of visible ASCII.
    pub(crate) fn read(path: &Path) -> Result<Self, KeyError> {
        Self::read_from(path).map_err(|why| KeyError { path: path.to_owned(), why })
    }

    fn read_from(path: &Path) -> Result<Self, NoKey> {
        if !std::fs::metadata(path).map_err(NoKey::Unreadable)?.is_file() {
            return Err(NoKey::NoFile);
        }
        let mut text = String::new();
        let file = std::fs::File::open(path).map_err(NoKey::Unreadable)?;
        file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(NoKey::Unreadable)?;
        let key = text.trim();
        if key.is_empty() || text.len() as u64 > MAX_BYTES || !key.bytes().all(|byte| byte.is_ascii_graphic())
        {
            return Err(NoKey::Malformed);
        }
        let mut header = HeaderValue::from_str(&format!("Bearer {key}")).map_err(|_| NoKey::Malformed)?;
        header.set_sensitive(true);
        Ok(Self(header))
    }

    /// A text of the engine's without the key, which some repeat as they refuse it.
    pub(crate) fn hidden_in(&self, text: &str) -> String {
        let bearer = self.0.to_str().unwrap_or_default();
        text.replace(bearer.strip_prefix("Bearer ").unwrap_or(bearer), "…")
    }

    pub(super) fn bearer(&self) -> HeaderValue {
        self.0.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2491
    #[test]
    fn a_key_is_one_line_and_is_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, "secret-of-the-engine\n").unwrap();
        let key = ApiKey::read(&path).unwrap();
        assert_eq!(key.bearer(), "Bearer secret-of-the-engine");
        assert!(!format!("{key:?} {:?}", key.bearer()).contains("secret"));
        assert_eq!(key.hidden_in("invalid key: secret-of-the-engine!"), "invalid key: …!");
        for bad in ["", "two words", "\u{e4}", &"x".repeat(5_000)] {
            std::fs::write(&path, bad).unwrap();
            let why = ApiKey::read(&path).unwrap_err().to_string();
            assert!(why.contains("key") && !why.contains("words"), "{why}");
        }
        assert!(ApiKey::read(folder.path()).unwrap_err().to_string().contains("no regular file"));
        assert!(ApiKey::read(&folder.path().join("none")).unwrap_err().to_string().contains("none"));
    }
}
