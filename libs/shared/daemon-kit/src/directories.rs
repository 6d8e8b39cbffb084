//! Where a daemon keeps its files when it is not told: systemd's directories, those of the system for
//! uid 0, those of the user. A `./.runtime` of earlier versions goes before them all.
//!
//! Nothing is made here but by [`writable`], which a daemon calls when it starts: whoever only asks
//! for the settings leaves no traces.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, Uid, access};

/// The directory that was used before there were others.
const BEFORE: &str = ".runtime";
/// Ours, in the directories that belong to all programs.
const OURS: &str = "llama-orch";
/// Below a directory that is not for logs only.
const LOGS: &str = "logs";

/// What a directory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// What outlives a reboot.
    State,
    /// What does not: handoff files and sockets.
    Runtime,
    Logs,
}

/// A setting that is a directory.
#[derive(Debug, Clone, Copy)]
pub struct Directory {
    /// Named as the setting's field.
    pub setting: &'static str,
    pub purpose: Purpose,
    /// Its folder below the directory of its purpose; nothing for logs, which are alone in theirs.
    pub folder: &'static str,
}

/// What decides where directories are.
#[derive(Debug, Clone)]
pub(crate) struct Surroundings<E> {
    /// A variable of the environment.
    pub(crate) variable: E,
    pub(crate) is_root: bool,
    /// The working directory has a `.runtime`.
    pub(crate) has_before: bool,
}

/// This process's.
pub(crate) fn surroundings() -> Surroundings<impl Fn(&str) -> Option<OsString>> {
    Surroundings {
        variable: |name: &str| std::env::var_os(name),
        is_root: Uid::effective().is_root(),
        has_before: Path::new(BEFORE).is_dir(),
    }
}

impl<E: Fn(&str) -> Option<OsString>> Surroundings<E> {
    /// Where the directory is that is not given: the first that can be written. None: there is none.
    pub(crate) fn place(&self, directory: &Directory) -> Option<PathBuf> {
        if self.has_before {
            let folder = if directory.purpose == Purpose::Logs { LOGS } else { directory.folder };
            return Some(Path::new(BEFORE).join(folder));
        }
        self.new_place(directory)
    }

    /// The same where no `.runtime` is.
    pub(crate) fn new_place(&self, directory: &Directory) -> Option<PathBuf> {
        self.roots(directory.purpose)
            .into_iter()
            .map(|root| match directory.folder {
                "" => root,
                folder => root.join(folder),
            })
            .find(|path| is_writable(path))
    }

    fn roots(&self, purpose: Purpose) -> Vec<PathBuf> {
        // A relative path of the environment is none. Source: the XDG base directory specification.
        let whole = |path: PathBuf| path.is_absolute().then_some(path);
        let variable = |name: &str| whole((self.variable)(name)?.into());
        // systemd lists several with colons between them.
        let of_service = |name: &str| {
            let list = (self.variable)(name)?;
            whole(list.to_str()?.split(':').next()?.into())
        };
        let state_home = || {
            let home = || Some(variable("HOME")?.join(".local/state"));
            Some(variable("XDG_STATE_HOME").or_else(home)?.join(OURS))
        };
        let (service, system, user) = match purpose {
            Purpose::State => ("STATE_DIRECTORY", "/var/lib", state_home()),
            Purpose::Runtime => {
                let own = variable("XDG_RUNTIME_DIR").map(|path| path.join(OURS));
                ("RUNTIME_DIRECTORY", "/run", own.or_else(state_home))
            }
            Purpose::Logs => ("LOGS_DIRECTORY", "/var/log", state_home().map(|home| home.join(LOGS))),
        };
        let last = if self.is_root { Some(Path::new(system).join(OURS)) } else { user };
        of_service(service).into_iter().chain(last).collect()
    }
}

/// Whether files can be made there, once the directories that are missing are made.
fn is_writable(path: &Path) -> bool {
    let there = path.ancestors().find(|ancestor| ancestor.exists());
    there.is_some_and(|there| there.is_dir() && access(there, AccessFlags::W_OK | AccessFlags::X_OK).is_ok())
}

/// A directory that a daemon must write, and cannot.
#[derive(Debug, thiserror::Error)]
#[error("{prefix}_{setting}: the directory {} cannot be made or written", path.display())]
pub struct DirectoryError {
    prefix: &'static str,
    setting: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Makes the directory, and shows that files can be written there. `setting` is the variable without
/// the daemon's prefix.
pub fn writable(prefix: &'static str, setting: &'static str, path: &Path) -> Result<(), DirectoryError> {
    let probe = path.join(format!(".{}.writable", std::process::id()));
    let written = std::fs::create_dir_all(path)
        .and_then(|()| std::fs::write(&probe, b""))
        .and_then(|()| std::fs::remove_file(&probe));
    written.map_err(|source| DirectoryError { prefix, setting, path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const MODELS: Directory = Directory { setting: "models_dir", purpose: Purpose::State, folder: "models" };
    const ENGINES: Directory =
        Directory { setting: "runtime_dir", purpose: Purpose::Runtime, folder: "engines" };
    const OUTPUT: Directory = Directory { setting: "logs_dir", purpose: Purpose::Logs, folder: "" };

    fn around(
        variables: &[(&str, &Path)],
        is_root: bool,
    ) -> Surroundings<impl Fn(&str) -> Option<OsString> + use<>> {
        let variables: BTreeMap<String, OsString> =
            variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).into())).collect();
        let variable = move |name: &str| variables.get(name).cloned();
        Surroundings { variable, is_root, has_before: false }
    }

    // CLOUD-2944
    #[test]
    fn a_directory_that_is_not_given_is_systemds_the_systems_or_the_users() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let (service, home, state, run) = (at.join("service"), at.join("home"), at.join("s"), at.join("run"));
        let list: PathBuf = format!("{}:/elsewhere", service.display()).into();
        let place = |variables: &[(&str, &Path)], is_root, directory| {
            around(variables, is_root).place(&directory).unwrap()
        };
        assert_eq!(
            place(&[("STATE_DIRECTORY", &list), ("HOME", &home)], false, MODELS),
            service.join("models")
        );
        assert_eq!(
            place(&[("RUNTIME_DIRECTORY", &run), ("HOME", &home)], true, ENGINES),
            run.join("engines")
        );
        assert_eq!(place(&[("LOGS_DIRECTORY", &run), ("HOME", &home)], true, OUTPUT), run);
        let of_home = home.join(".local/state/llama-orch");
        assert_eq!(place(&[("HOME", &home)], false, MODELS), of_home.join("models"));
        assert_eq!(place(&[("HOME", &home)], false, OUTPUT), of_home.join("logs"));
        assert_eq!(place(&[("HOME", &home)], false, ENGINES), of_home.join("engines"));
        let users: [(&str, &Path); 3] =
            [("HOME", &home), ("XDG_STATE_HOME", &state), ("XDG_RUNTIME_DIR", &run)];
        assert_eq!(place(&users, false, MODELS), state.join("llama-orch/models"));
        assert_eq!(place(&users, false, ENGINES), run.join("llama-orch/engines"));
        let relative: [(&str, &Path); 2] = [("HOME", &home), ("XDG_STATE_HOME", Path::new("s"))];
        assert_eq!(place(&relative, false, MODELS), of_home.join("models"));
        let root = around(&users, true);
        let system = |purpose| root.roots(purpose);
        assert_eq!(system(Purpose::State), [Path::new("/var/lib/llama-orch")]);
        assert_eq!(system(Purpose::Runtime), [Path::new("/run/llama-orch")]);
        assert_eq!(system(Purpose::Logs), [Path::new("/var/log/llama-orch")]);
        assert!(!of_home.exists() && !service.exists(), "looking makes nothing");
    }

    // CLOUD-2945
    #[test]
    fn a_runtime_directory_of_before_goes_before_them_all() {
        let around = Surroundings { has_before: true, ..around(&[("HOME", Path::new("/root"))], false) };
        assert_eq!(around.place(&MODELS).unwrap(), Path::new(".runtime/models"));
        assert_ne!(around.new_place(&MODELS), around.place(&MODELS));
    }

    // CLOUD-2946
    #[test]
    fn what_cannot_be_written_is_no_place_and_says_its_setting() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, b"").unwrap();
        assert_eq!(around(&[("HOME", &file)], false).place(&MODELS), None);
        assert_eq!(around(&[], false).place(&MODELS), None);
        let error = writable("DAEMON", "MODELS_DIR", &file.join("models")).unwrap_err();
        assert!(error.to_string().starts_with("DAEMON_MODELS_DIR: the directory "), "{error}");
        let there = folder.path().join("a/b");
        writable("DAEMON", "MODELS_DIR", &there).unwrap();
        assert_eq!(std::fs::read_dir(there).unwrap().count(), 0);
    }
}
