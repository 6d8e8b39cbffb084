//! The daemons of the commit before the link, which `old-commit` names.
//!
//! `cargo xtask test` builds them into the cache beforehand, where the clone has the commit.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The program of that commit. Nothing, which is said, where the clone does not have the commit.
pub fn program(name: &str) -> Option<PathBuf> {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = crate_dir.ancestors().nth(2).expect("the crate lies two folders deep");
    let commit = std::fs::read_to_string(crate_dir.join("old-commit")).expect("the file that names a commit");
    let commit = commit.trim();
    let path = root.join(".cache/old").join(commit).join(name);
    if path.is_file() {
        return Some(path);
    }
    let mut look = Command::new("git");
    look.current_dir(root).args(["cat-file", "-e", &format!("{commit}^{{commit}}")]);
    let is_there = look.output().is_ok_and(|output| output.status.success());
    assert!(
        !is_there,
        "{name} of {commit} is not built: run `cargo xtask old` once (`cargo xtask test` does)"
    );
    crate::left_out(&format!("no older version stands beside this one: this clone lacks commit {commit}"));
    None
}
