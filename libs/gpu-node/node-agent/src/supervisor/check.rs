//! What a daemon would say of a file of pools, without anything being started or fetched.
//!
//! Whether there are the devices and the memory is the running node's to say: other engines have some of it.

use std::path::Path;

use pool_registry_types::PoolId;

use super::launch::{self, PrepareError, Spec};
use super::provision::{PackageError, Sources};
use crate::download::Hub;
use crate::pools_file::{PoolsFile, Provisioning};

/// What was found of one pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// All that its engine needs is there.
    Ready,
    /// The node would fetch this first, as the file allows.
    Fetched(String),
    /// Why it cannot be started.
    Lacking(String),
}

/// Looks whether each pool of the file could be started. `forbid`: nothing is fetched, whatever the file
/// allows. Errors: that an HTTP client cannot be made.
pub async fn check(
    file: &PoolsFile,
    models_dir: &Path,
    packages_dir: &Path,
    forbid: bool,
) -> Result<Vec<(PoolId, Finding)>, reqwest::Error> {
    let client = crate::download::client()?;
    let allowed = if forbid { Provisioning::default() } else { file.provisioning };
    // Nothing is fetched; what would be is an error that is known.
    let hub = Hub { endpoint: "", token: None };
    let sources =
        Sources { models_dir, packages_dir, allowed: Provisioning::default(), hub, client: &client };
    let mut found = Vec::new();
    for (id, pool) in &file.pools {
        let spec = Spec { pool: pool.clone(), model: file.models.get(&pool.model).cloned() };
        found.push((id.clone(), finding(&spec, &sources, allowed).await));
    }
    Ok(found)
}

async fn finding(spec: &Spec, sources: &Sources<'_>, allowed: Provisioning) -> Finding {
    let mut fetched = Vec::new();
    let mut error = launch::prepare(spec, sources, &|_| {}).await.err();
    if let Some(PrepareError::Package(PackageError::InstallsOff { what, .. })) = &error
        && allowed.installs
    {
        fetched.push(what.clone());
        // It was looked at before the model.
        error = if launch::loads_file(spec) {
            launch::model_file(spec, sources, &|_| {}).await.err()
        } else {
            None
        };
    }
    if let Some(PrepareError::DownloadsOff { origin, .. }) = &error
        && allowed.downloads
    {
        fetched.push(origin.clone());
        error = None;
    }
    match error {
        Some(error) => Finding::Lacking(error.to_string()),
        None if fetched.is_empty() => Finding::Ready,
        None => Finding::Fetched(fetched.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2957
    #[tokio::test]
    async fn each_pool_is_told_what_it_lacks_or_what_would_be_fetched_and_nothing_is() {
        // Only the first installation in a process can fail.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = tempfile::tempdir().unwrap();
        let (models, packages) = (folder.path().join("models"), folder.path().join("packages"));
        let program = folder.path().join("engine");
        std::fs::write(&program, "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let text = |allows: bool| {
            format!(
                "provisioning.downloads = {allows}\nprovisioning.installs = {allows}\n\
                 models.far.source = \"hf:org/far/far.gguf\"\nmodels.gone.source = \"{gone}\"\n\
                 [pools.lost]\nengine = \"llamacpp\"\nmodel = \"nowhere\"\nprovision = {{ mode = \"binary\", program = \"{program}\" }}\n\
                 [pools.moved]\nengine = \"llamacpp\"\nmodel = \"gone\"\nprovision = {{ mode = \"package\" }}\n\
                 [pools.new]\nengine = \"llamacpp\"\nmodel = \"far\"\nprovision = {{ mode = \"package\" }}\n\
                 [pools.none]\nengine = \"vllm\"\nmodel = \"m\"\nprovision = {{ mode = \"binary\", program = \"no-such-engine\" }}\n\
                 [pools.theirs]\nengine = \"openai\"\nmodel = \"m\"\nprovision = {{ mode = \"external\", url = \"http://127.0.0.1:9\" }}\n",
                gone = folder.path().join("gone.gguf").display(),
                program = program.display(),
            )
        };
        let look = async |allows: bool, forbid: bool| {
            let file = PoolsFile::parse(&text(allows)).unwrap();
            let found = check(&file, &models, &packages, forbid).await.unwrap();
            found.into_iter().map(|(_, finding)| finding).collect::<Vec<Finding>>()
        };
        let lacks = |finding: &Finding, part: &str| {
            assert!(
                matches!(finding, Finding::Lacking(why) if why.contains(part)),
                "{finding:?}, not {part}"
            );
        };
        let found = look(true, false).await;
        lacks(&found[0], "nowhere has no entry");
        lacks(&found[1], "gone.gguf: No such file");
        assert!(
            matches!(&found[2], Finding::Fetched(what) if what.starts_with("xllamacpp==") && what.ends_with("hf:org/far/far.gguf")),
            "{:?}",
            found[2]
        );
        lacks(&found[3], "no-such-engine is not on the PATH");
        assert_eq!(found[4], Finding::Ready);
        for found in [look(false, false).await, look(true, true).await] {
            lacks(&found[2], "provisioning.installs is off");
        }
        assert!(!models.exists() && !packages.exists(), "nothing was fetched");
    }
}
