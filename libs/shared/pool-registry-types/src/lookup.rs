//! A map that is asked by key and never walked in an order of its own.
//!
//! The decisions of the pure crates must be the same every time, so they use no hash map: its order
//! varies. Where nothing is walked, there is no order to vary, and a text key among many thousands is
//! found by reading it once instead of comparing it with the keys on a path through a tree. What is
//! walked now and then, for readers, is sorted for that ([`Lookup::in_order`]).
//!
//! The usual hash is quick and keyed at random, and made for keys of ours and of nodes, which an operator
//! lets in. Keys that clients choose, the ids of their tasks, take the slower one of the standard library,
//! against which nobody can choose ones that collide.

#[expect(clippy::disallowed_types, reason = "it is not walked but in the order of the keys")]
use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, Hash};

use foldhash::fast::RandomState;

/// Values by key. Growing moves all keys and values now and then: large values go into a box.
#[expect(clippy::disallowed_types, reason = "it is not walked but in the order of the keys")]
pub struct Lookup<K, V, S = RandomState>(HashMap<K, V, S>);

impl<K, V, S: Default> Default for Lookup<K, V, S> {
    fn default() -> Self {
        Self(Default::default())
    }
}

impl<K: Ord + Hash, V, S: BuildHasher> Lookup<K, V, S> {
    pub fn get(&self, key: &K) -> Option<&V> {
        self.0.get(key)
    }

    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.0.get_mut(key)
    }

    pub fn contains_key(&self, key: &K) -> bool {
        self.0.contains_key(key)
    }

    /// The value of the key, which is made where there is none.
    pub fn get_or_insert_with(&mut self, key: K, make: impl FnOnce() -> V) -> &mut V {
        self.0.entry(key).or_insert_with(make)
    }

    /// Returns the value that the key had before.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.0.insert(key, value)
    }

    pub fn remove(&mut self, key: &K) -> Option<V> {
        self.0.remove(key)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Everything in the order of the keys. Sorts: for readers, not for events.
    pub fn in_order(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        let mut entries: Vec<(&K, &V)> = self.0.iter().collect();
        entries.sort_unstable_by_key(|(key, _)| *key);
        entries.into_iter()
    }
}

impl<K: Ord + Hash + fmt::Debug, V: fmt::Debug, S: BuildHasher> fmt::Debug for Lookup<K, V, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.in_order()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        // CLOUD-1780
        /// Whatever was put in and taken out, it answers as an ordered map does, and in its order.
        #[test]
        fn a_lookup_answers_as_an_ordered_map_does(
            steps in prop::collection::vec((0_u8..3, 0_u8..24, any::<u16>()), 0..200)
        ) {
            let (mut lookup, mut map) = (Lookup::<u8, u16>::default(), BTreeMap::new());
            for (step, key, value) in steps {
                match step {
                    0 => prop_assert_eq!(lookup.insert(key, value), map.insert(key, value)),
                    1 => prop_assert_eq!(lookup.remove(&key), map.remove(&key)),
                    _ => {
                        let made = *lookup.get_or_insert_with(key, || value);
                        prop_assert_eq!(made, *map.entry(key).or_insert(value));
                    }
                }
                prop_assert_eq!(lookup.get(&key), map.get(&key));
                prop_assert_eq!(lookup.contains_key(&key), map.contains_key(&key));
                prop_assert_eq!((lookup.len(), lookup.is_empty()), (map.len(), map.is_empty()));
            }
            prop_assert!(lookup.in_order().eq(map.iter()));
            prop_assert_eq!(format!("{lookup:?}"), format!("{map:?}"));
        }
    }
}
