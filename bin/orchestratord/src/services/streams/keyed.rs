//! Answers that are passed on to more than one reader: those of requests with an `Idempotency-Key`.
//!
//! A caller and its key name a task while that runs, and its content once it has completed. Everything
//! stands where it is dropped together: the key's entry is owned by the stream that it names, so a stream
//! that is evicted, forgotten or ends with an error frees its key by that alone. Lock order: a stream's own
//! lock before that of the keys.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;
use pool_registry_types::{ErrorBody, ErrorCode, HolderId, TaskId};
use task_stream::BodyDigest;
use tokio::sync::futures::Notified;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{CountedLog, OWN_BYTES, ReadFrames, ReadPosition, TaskStream, own_part};

/// Keys in use, of all callers and of one. Source: .specs/01 CLOUD-2916.
const MOST_KEYS: usize = 10_000;
const MOST_OF_ONE: usize = MOST_KEYS / 2;
/// Readers of one answer at once.
const MOST_READERS: usize = 64;
/// Longest answer that is kept whole for those who may still come, bytes. Source: .specs/01 CLOUD-2914.
const KEPT_BYTES: usize = 8 * 1024 * 1024;
/// When a request may come again for whose key there was no room, milliseconds.
const RETRY_AFTER_MS: u64 = 10_000;
const MOST_CHARS: usize = 255;

/// A client's own name for a request: 1 to 255 visible characters. Shown nowhere.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct IdempotencyKey(Box<str>);

impl IdempotencyKey {
    /// Nothing where the text is none.
    pub(crate) fn new(text: &str) -> Option<Self> {
        let is_key = (1..=MOST_CHARS).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        is_key.then(|| Self(text.into()))
    }
}

impl std::fmt::Debug for IdempotencyKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IdempotencyKey")
    }
}

/// Whose key it is, and the key.
pub(crate) type KeyOf = (HolderId, IdempotencyKey);

/// A task that a key names.
#[derive(Debug, Clone)]
struct Named {
    task_id: TaskId,
    /// Its client asked for a stream.
    streams: bool,
    stream: Weak<TaskStream>,
}

#[derive(Debug)]
struct Entry {
    /// Told from an entry that had its place before, or has it afterwards.
    number: u64,
    fingerprint: BodyDigest,
    /// Nothing until its task was admitted; closed when it was not, or the key is free again.
    named: watch::Receiver<Option<Named>>,
}

#[derive(Debug, Default)]
struct Table {
    entries: HashMap<KeyOf, Entry>,
    of_holder: HashMap<HolderId, usize>,
    came: u64,
}

/// All keys in use.
#[derive(Debug, Default)]
pub(crate) struct Keys(Mutex<Table>);

/// A key that names a task, or will: free again when it is dropped.
#[derive(Debug)]
pub(crate) struct HeldKey {
    keys: Arc<Keys>,
    of: KeyOf,
    number: u64,
    named: watch::Sender<Option<Named>>,
}

impl Drop for HeldKey {
    fn drop(&mut self) {
        let mut table = self.keys.0.lock();
        if table.entries.get(&self.of).is_none_or(|entry| entry.number != self.number) {
            return;
        }
        table.entries.remove(&self.of);
        if let Some(count) = table.of_holder.get_mut(&self.of.0) {
            *count -= 1;
            if *count == 0 {
                table.of_holder.remove(&self.of.0);
            }
        }
    }
}

/// What a request with a key is.
#[derive(Debug)]
pub(crate) enum Claim {
    /// The first of its name: a task is to be made of it.
    New(HeldKey),
    /// One more reader of a task's answer.
    Attached { task_id: TaskId, streams: bool, place: ReaderPlace },
}

impl Keys {
    /// Finds what the key names, waiting for the admission of a task that it will name.
    ///
    /// # Errors
    /// `TASK_CONFLICT` where the key is that of another request, `RATE_LIMITED` and `OVERLOADED`.
    pub(crate) async fn claim(
        self: &Arc<Self>,
        of: KeyOf,
        fingerprint: BodyDigest,
    ) -> Result<Claim, ErrorBody> {
        loop {
            let mut named = match self.entry(&of, fingerprint)? {
                Ok(key) => return Ok(Claim::New(key)),
                Err(named) => named,
            };
            let named = named.wait_for(Option::is_some).await.ok().and_then(|named| named.clone());
            // The key may have become free meanwhile: whoever freed it took its entry away before.
            let Some(Named { task_id, streams, stream }) = named else { continue };
            let Some(stream) = stream.upgrade() else { continue };
            if let Some(place) = stream.join_keyed()? {
                return Ok(Claim::Attached { task_id, streams, place });
            }
        }
    }

    /// A new entry, or what the one that is there will name.
    fn entry(
        self: &Arc<Self>,
        of: &KeyOf,
        fingerprint: BodyDigest,
    ) -> Result<Result<HeldKey, watch::Receiver<Option<Named>>>, ErrorBody> {
        let mut table = self.0.lock();
        if let Some(entry) = table.entries.get(of) {
            if entry.fingerprint != fingerprint {
                let message = "the Idempotency-Key is that of another request";
                return Err(ErrorBody::new(ErrorCode::TaskConflict, message));
            }
            return Ok(Err(entry.named.clone()));
        }
        if table.entries.len() >= MOST_KEYS {
            let message = format!("{MOST_KEYS} Idempotency-Keys are in use, which is the most");
            return Err(ErrorBody::new(ErrorCode::Overloaded, message).retry_after_ms(RETRY_AFTER_MS));
        }
        let count = table.of_holder.entry(of.0).or_default();
        if *count >= MOST_OF_ONE {
            let message =
                format!("{MOST_OF_ONE} Idempotency-Keys of the caller are in use, which is the most");
            return Err(ErrorBody::new(ErrorCode::RateLimited, message).retry_after_ms(RETRY_AFTER_MS));
        }
        *count += 1;
        table.came += 1;
        let (number, (sender, named)) = (table.came, watch::channel(None));
        table.entries.insert(of.clone(), Entry { number, fingerprint, named });
        Ok(Ok(HeldKey { keys: Arc::clone(self), of: of.clone(), number, named: sender }))
    }
}

/// The readers of an answer that has a key.
#[derive(Debug)]
pub(super) struct Shared {
    /// Absent once nobody more may come: then only what a reader has not taken is kept.
    key: Option<HeldKey>,
    /// What each reads next.
    readers: BTreeMap<u64, u64>,
    came: u64,
}

impl Shared {
    /// Nobody may come any more.
    pub(super) fn free_key(&mut self) {
        self.key = None;
    }

    /// Of whom something must be kept.
    fn first(&self) -> u64 {
        self.readers.values().min().copied().unwrap_or(u64::MAX)
    }
}

impl CountedLog {
    /// Sees to it that so many bytes more have room. Of an answer that is longer than is kept whole the
    /// beginning goes, and with it the key; where that is not enough, the readers that are farthest behind
    /// do, but for the last one.
    pub(super) fn make_way(&mut self, more: usize) {
        let Some(shared) = &mut self.shared else { return };
        if shared.key.is_some() && self.log.len_bytes() + more > KEPT_BYTES {
            shared.free_key();
        }
        if shared.key.is_some() {
            return;
        }
        loop {
            self.log.drop_before(shared.first());
            if more <= self.log.room() || shared.readers.len() <= 1 {
                return;
            }
            let slowest = shared.readers.iter().min_by_key(|(_, next)| **next).map(|(number, _)| *number);
            shared.readers.remove(&slowest.unwrap_or_default());
        }
    }
}

impl TaskStream {
    /// The answer is that of the key, and is kept for all who come with it.
    pub(crate) fn keep_for(self: &Arc<Self>, key: HeldKey, task_id: TaskId, streams: bool) -> ReaderPlace {
        let named = Named { task_id, streams, stream: Arc::downgrade(self) };
        let mut kept = self.kept.lock();
        // It may have ended, or been let go of, before it came to this.
        let is_over = kept.is_released || self.error.get().is_some();
        key.named.send_replace(Some(named));
        let key = (!is_over).then_some(key);
        kept.shared = Some(Shared { key, readers: BTreeMap::from([(1, 0)]), came: 1 });
        drop(kept);
        ReaderPlace { stream: Arc::clone(self), number: 1 }
    }

    /// One more reader from the first byte on; nothing where nobody more may come. Errors: `RATE_LIMITED`.
    fn join_keyed(self: &Arc<Self>) -> Result<Option<ReaderPlace>, ErrorBody> {
        let mut kept = self.kept.lock();
        let Some(shared) = kept.shared.as_mut().filter(|shared| shared.key.is_some()) else {
            return Ok(None);
        };
        if shared.readers.len() >= MOST_READERS {
            let message = format!("{MOST_READERS} read this answer, which is the most");
            return Err(ErrorBody::new(ErrorCode::RateLimited, message).retry_after_ms(RETRY_AFTER_MS));
        }
        shared.came += 1;
        let number = shared.came;
        shared.readers.insert(number, 0);
        Ok(Some(ReaderPlace { stream: Arc::clone(self), number }))
    }

    /// Whether the answer is kept for whoever comes with its key.
    pub(super) fn has_key(&self) -> bool {
        self.kept.lock().shared.as_ref().is_some_and(|shared| shared.key.is_some())
    }

    /// The answer is nobody's any more by its key.
    pub(super) fn free_key(&self) {
        if let Some(shared) = &mut self.kept.lock().shared {
            shared.free_key();
        }
    }
}

/// The place of one reader of an answer that others may read too.
#[derive(Debug)]
pub(crate) struct ReaderPlace {
    stream: Arc<TaskStream>,
    number: u64,
}

impl ReaderPlace {
    pub(crate) fn stream(&self) -> &Arc<TaskStream> {
        &self.stream
    }

    /// As [`TaskStream::pass`], for one reader of several.
    pub(crate) fn pass(&self, at: ReadPosition) -> Result<ReadFrames, Notified<'_>> {
        let changed = self.stream.changed.notified();
        let read = {
            let mut kept = self.stream.kept.lock();
            let kept = &mut *kept;
            let place = kept.shared.as_mut().and_then(|shared| shared.readers.get_mut(&self.number));
            let Some(place) = place.filter(|_| !kept.is_released) else {
                // What it was told beside its bytes says why.
                return Ok(ReadFrames { bytes: Bytes::new(), place: at, is_last: true });
            };
            *place = at.frame;
            if let Some(shared) = kept.shared.as_ref().filter(|shared| shared.key.is_none()) {
                kept.log.drop_before(shared.first());
                kept.count(&self.stream.live_bytes);
            }
            kept.read = Instant::now();
            kept.log.read_from(at.frame, OWN_BYTES)
        };
        own_part(read, at).ok_or(changed)
    }

    /// The reader was so slow that it made room for others.
    pub(crate) fn has_made_room(&self) -> bool {
        let kept = self.stream.kept.lock();
        kept.shared.as_ref().is_none_or(|shared| !shared.readers.contains_key(&self.number))
    }

    /// The reader goes. Returns who is to be waited for where it was the last one and the answer goes on.
    pub(crate) fn leave(&self) -> Option<Awaited> {
        let mut kept = self.stream.kept.lock();
        let is_running = !kept.log.is_finished() && !kept.is_released;
        let shared = kept.shared.as_mut()?;
        shared.readers.remove(&self.number);
        let is_last = shared.readers.is_empty() && is_running;
        let may_come = shared.key.is_some();
        is_last.then(|| Awaited { stream: Arc::downgrade(&self.stream), came: shared.came, may_come })
    }

    /// Nobody can read the answer from its beginning any more, and nobody else reads it.
    pub(crate) fn is_the_last(&self) -> bool {
        let kept = self.stream.kept.lock();
        let is_own = |shared: &Shared| shared.readers.keys().all(|number| *number == self.number);
        kept.shared.as_ref().is_none_or(|shared| shared.key.is_none() && is_own(shared))
    }
}

/// An answer that goes on without a reader.
#[derive(Debug)]
pub(crate) struct Awaited {
    stream: Weak<TaskStream>,
    /// Readers that had come by then.
    came: u64,
    /// Somebody with the key may come.
    pub(crate) may_come: bool,
}

impl Awaited {
    /// Whether nobody has come since, and the answer still goes on.
    pub(crate) fn is_alone(&self) -> bool {
        self.stream.upgrade().is_some_and(|stream| {
            let kept = stream.kept.lock();
            let is_running = !kept.log.is_finished() && !kept.is_released;
            is_running && kept.shared.as_ref().is_some_and(|shared| shared.came == self.came)
        })
    }
}

#[cfg(test)]
#[path = "keyed_tests.rs"]
mod tests;
