//! Files of pools: what is accepted can be written and read again, keeps its fingerprints, and
//! holds what a supervisor counts on.

#![no_main]

use std::collections::BTreeSet;

use libfuzzer_sys::fuzz_target;
use node_agent::pools_file::{LoadWhen, PoolsFile, PoolsFileError, Provision};

fuzz_target!(|text: &str| {
    let file = match PoolsFile::parse(text) {
        Ok(file) => file,
        Err(PoolsFileError::Field { field, what }) => {
            assert!(field.starts_with("pools.") && !what.is_empty(), "{field}: {what}");
            return;
        }
        Err(_) => return,
    };
    let written =
        toml::to_string(&file).unwrap_or_else(|error| panic!("{file:?} cannot be written: {error}"));
    let again = PoolsFile::parse(&written).unwrap_or_else(|error| panic!("{written}\nis refused: {error}"));
    assert_eq!(again, file, "{written}");
    let mut ports = BTreeSet::new();
    for (id, pool) in &file.pools {
        assert!(
            pool.ports.iter().all(|port| *port > 0 && ports.insert(*port)),
            "{id}: a port is given twice"
        );
        assert!((1..=64).contains(&pool.replicas) && (1..=4096).contains(&pool.slots), "{id}");
        assert!(pool.exit_limit > 0 && pool.load_timeout_secs > 0, "{id}");
        assert!(pool.tensor_split.is_empty() || pool.tensor_split.len() == pool.devices.len(), "{id}");
        assert!(pool.mask().is_none_or(|mask| !mask.is_empty()), "{id}");
        assert_eq!(pool.models().first(), Some(&pool.model));
        if matches!(pool.provision, Provision::External { .. }) {
            assert!(pool.load == LoadWhen::Always && pool.replicas == 1 && !pool.keep_on_exit, "{id}");
        }
        let model = file.models.get(&pool.model);
        let same = again.pools[id].fingerprint(again.models.get(&pool.model));
        assert_eq!(pool.fingerprint(model), same, "{id}: another fingerprint");
    }
});
