//! How many read one stream at once, and who makes room for whom.
//!
//! Whoever submitted a task always finds room to read its stream: connections that have died unseen,
//! and others that read it too, never keep it out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use pool_registry_types::{ErrorBody, ErrorCode};

/// Readers of one stream at once. Source: .specs/01 CLOUD-2763.
const MOST_READERS: usize = 64;

/// The readers of one stream.
#[derive(Debug, Default)]
pub(crate) struct ReaderPermits(Mutex<Readers>);

#[derive(Debug, Default)]
struct Readers {
    /// Readers that ever came.
    came: u64,
    /// In the order in which they came: whether one is the owner's, and what ends it.
    reading: BTreeMap<u64, (bool, Arc<AtomicBool>)>,
}

impl ReaderPermits {
    /// One reader more. For the owner's the first one of somebody else ends, or its own first one.
    ///
    /// # Errors
    /// `RATE_LIMITED` when so many read that one more would be too many.
    pub(crate) fn take(self: &Arc<Self>, is_owner: bool) -> Result<ReaderPermit, ErrorBody> {
        let mut readers = self.0.lock();
        if readers.reading.len() >= MOST_READERS {
            if !is_owner {
                let message = format!("{MOST_READERS} read this stream, which is the most");
                return Err(ErrorBody::new(ErrorCode::RateLimited, message));
            }
            let of_others = readers.reading.iter().find(|(_, (is_owners, _))| !is_owners);
            let first = of_others.or(readers.reading.first_key_value()).map(|(number, _)| *number);
            if let Some((_, ended)) = first.and_then(|number| readers.reading.remove(&number)) {
                ended.store(true, Ordering::Relaxed);
            }
        }
        readers.came += 1;
        let (number, ended) = (readers.came, Arc::<AtomicBool>::default());
        readers.reading.insert(number, (is_owner, ended.clone()));
        Ok(ReaderPermit { of: Arc::clone(self), number, ended })
    }

    /// Whether nobody reads the stream.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.lock().reading.is_empty()
    }
}

/// One reader among those of a stream, until it is dropped.
#[derive(Debug)]
pub(crate) struct ReaderPermit {
    of: Arc<ReaderPermits>,
    number: u64,
    ended: Arc<AtomicBool>,
}

impl ReaderPermit {
    /// The reader has made room for another.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }
}

impl Drop for ReaderPermit {
    fn drop(&mut self) {
        self.of.0.lock().reading.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2763
    #[test]
    fn the_owner_of_a_stream_always_reads_it_and_others_make_room_before_its_own_do() {
        let permits = Arc::new(ReaderPermits::default());
        let mut own = vec![permits.take(true).unwrap()];
        let others: Vec<_> = (1..MOST_READERS).map(|_| permits.take(false).unwrap()).collect();
        let refused = permits.take(false).unwrap_err();
        assert_eq!(refused.code, ErrorCode::RateLimited);
        for _ in 1..MOST_READERS {
            own.push(permits.take(true).unwrap());
        }
        assert!(others.iter().all(ReaderPermit::has_ended));
        assert!(!own.iter().any(ReaderPermit::has_ended));
        // Its own that it has forgotten of.
        let next = permits.take(true).unwrap();
        let ended: Vec<bool> = own.iter().map(ReaderPermit::has_ended).collect();
        assert!(ended[0] && !ended[1..].contains(&true) && !next.has_ended());
        drop((own, others));
        assert_eq!(permits.0.lock().reading.len(), 1);
        assert!(permits.take(false).is_ok());
    }
}
