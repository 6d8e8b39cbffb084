//! The daemons of the commit before the link, which `old-commit` names.
//!
//! `cargo xtask test` builds them into the cache beforehand; without them these journeys fail and say
//! so, because a skipped proof is none.

use std::path::{Path, PathBuf};

/// The program of that commit.
pub fn program(name: &str) -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = crate_dir.ancestors().nth(2).expect("the crate lies two folders deep");
    let commit = std::fs::read_to_string(crate_dir.join("old-commit")).expect("the file that names a commit");
    let path = root.join(".cache/old").join(commit.trim()).join(name);
    assert!(
        path.is_file(),
        "{name} of {} is not built: run `cargo xtask old` once (`cargo xtask test` does)",
        commit.trim()
    );
    path
}
