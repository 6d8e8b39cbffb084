//! The daemons of the commit before the link, built once into the cache for the journeys that put them
//! beside today's.

use std::path::Path;
use std::process::Command;

use crate::steps::{Failed, cache, read, root, run, say};

/// The file that names the commit.
const NAMES_IT: &str = "test-harness/e2e-cloud/old-commit";
const DAEMONS: [&str; 2] = ["orchestratord", "pool-managerd"];

/// Builds what is not there, if the clone has the commit. The programs of another commit go.
pub(crate) fn build() -> Result<(), Failed> {
    let commit = read(&root().join(NAMES_IT))?.trim().to_owned();
    let folder = cache().join("old");
    let programs = folder.join(&commit);
    if DAEMONS.iter().all(|name| programs.join(name).is_file()) {
        return Ok(());
    }
    let _ = std::fs::remove_dir_all(&folder);
    if !has(&commit) {
        say(&format!(
            "this clone lacks commit {commit}, which {NAMES_IT} names (it is a shallow one): no older version is put beside this one"
        ));
        return Ok(());
    }
    say(&format!("building the daemons of {commit} into .cache/old, once"));
    let (source, target) = (folder.join("source"), folder.join("target"));
    unpack(&commit, &source)?;
    let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build.args(["build", "--locked", "--quiet", "--manifest-path"]).arg(source.join("Cargo.toml"));
    build.arg("--target-dir").arg(&target);
    build.args(DAEMONS.iter().flat_map(|name| ["--package", name]));
    run(&mut build, "the daemons of the commit before the link must build")?;
    // Only what is whole is found there.
    let whole = folder.join("whole");
    make(&whole)?;
    for name in DAEMONS {
        let from = target.join("debug").join(name);
        std::fs::copy(&from, whole.join(name))
            .map_err(|error| Failed(format!("{}: {error}", from.display())))?;
    }
    std::fs::rename(&whole, &programs).map_err(|error| Failed(format!("{}: {error}", programs.display())))?;
    // The programs are all that is used; what they were built from takes a gigabyte.
    let _ = std::fs::remove_dir_all(target);
    let _ = std::fs::remove_dir_all(source);
    Ok(())
}

fn has(commit: &str) -> bool {
    let mut look = Command::new("git");
    look.current_dir(root()).args(["cat-file", "-e", &format!("{commit}^{{commit}}")]);
    look.output().is_ok_and(|looked| looked.status.success())
}

fn unpack(commit: &str, source: &Path) -> Result<(), Failed> {
    make(source)?;
    let archive = source.with_extension("tar");
    let mut pack = Command::new("git");
    run(
        pack.args(["archive", "--output"]).arg(&archive).arg(commit),
        "git must be able to read its commits",
    )?;
    let mut unpack = Command::new("tar");
    run(unpack.arg("--extract").arg("--file").arg(&archive).arg("--directory").arg(source), "tar is needed")?;
    let _ = std::fs::remove_file(archive);
    Ok(())
}

fn make(folder: &Path) -> Result<(), Failed> {
    std::fs::create_dir_all(folder).map_err(|error| Failed(format!("{}: {error}", folder.display())))
}
