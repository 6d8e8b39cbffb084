//! The key that an engine asks for.

use std::io::Read;
use std::path::Path;

use http::HeaderValue;

/// Longest key, bytes.
const MAX_BYTES: u64 = 4096;

/// What is sent as bearer token to one engine. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(HeaderValue);

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

impl ApiKey {
    /// The key that the file holds: one line of visible ASCII. The error names the file and never
    /// shows what is in it.
    pub fn read(path: &Path) -> Result<Self, String> {
        let why = |what: &str| format!("api_key_file: {}: {what}", path.display());
        let about = std::fs::metadata(path).map_err(|error| why(&error.to_string()))?;
        if !about.is_file() {
            return Err(why("is no regular file"));
        }
        let mut text = String::new();
        let file = std::fs::File::open(path).map_err(|error| why(&error.to_string()))?;
        file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(|error| why(&error.to_string()))?;
        let key = text.trim();
        if key.is_empty() || text.len() as u64 > MAX_BYTES || !key.bytes().all(|byte| byte.is_ascii_graphic())
        {
            return Err(why("must hold one key of visible ASCII, at most 4,096 bytes"));
        }
        let mut header = HeaderValue::from_str(&format!("Bearer {key}")).map_err(|_| why("is no key"))?;
        header.set_sensitive(true);
        Ok(Self(header))
    }

    /// A text of the engine's without the key, which some repeat as they refuse it.
    pub fn hidden_in(&self, text: &str) -> String {
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
            let why = ApiKey::read(&path).unwrap_err();
            assert!(why.contains("key") && !why.contains("words"), "{why}");
        }
        assert!(ApiKey::read(folder.path()).unwrap_err().contains("no regular file"));
        assert!(ApiKey::read(&folder.path().join("none")).unwrap_err().contains("none"));
    }
}
