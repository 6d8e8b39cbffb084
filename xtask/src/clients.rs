//! The clients of other APIs, from the package index into the cache: what the journeys try the gateway with.

use std::path::PathBuf;

use crate::engine;
use crate::steps::{Failed, cache, root};

/// A Python that sees them. Versions and hashes stand in `test-harness/clients/requirements.lock`.
pub(crate) fn python() -> Result<PathBuf, Failed> {
    let lock = root().join("test-harness/clients/requirements.lock");
    engine::launcher("the clients of other APIs (wheels of 25 MB)", &cache().join("clients"), &lock)
}
