//! The engine's ids of a task's tokens: what a stream that continues from its end begins with.

/// Most ids that are kept of one task, 1 MiB: what has more goes on by its text. More than any log
/// holds of honest frames, while a node may claim half a million of each.
const MOST_IDS: usize = 256 * 1024;

/// The ids of the tokens in a log, from the first frame on.
#[derive(Debug, Default)]
pub struct TokenIds {
    ids: Vec<u32>,
    /// There were more than are kept.
    overflown: bool,
    /// Frames that said how many tokens there are, without a gap.
    frames: u64,
    /// Tokens up to the last of them; as many as there are ids where those are all known.
    count: u64,
}

impl TokenIds {
    /// Remembers the ids of the tokens that frame `index` has brought, and the count of all so far.
    /// What does not follow the frame before is left out.
    pub(crate) fn keep(&mut self, index: u64, count: u64, ids: &[u32]) {
        if self.frames == index {
            self.frames += 1;
            self.count = count;
            if self.overflown || self.ids.len() + ids.len() > MOST_IDS {
                self.overflown = true;
                self.ids = Vec::new();
                return;
            }
            self.ids.extend_from_slice(ids);
        }
    }

    /// The number of all tokens, where each of `frames` frames has said it.
    pub fn count(&self, frames: u64) -> Option<u64> {
        (self.frames == frames).then_some(self.count)
    }

    /// The ids of all tokens, where each of `frames` frames has brought the ids of its own.
    pub fn all(&self, frames: u64) -> Option<&[u32]> {
        let count = self.count(frames)?;
        (!self.overflown && self.ids.len() as u64 == count).then_some(self.ids.as_slice())
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.ids.len() * size_of::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-1613
    #[test]
    fn ids_are_kept_up_to_a_bound_and_beyond_it_none_are() {
        let mut ids = TokenIds::default();
        let many = vec![7; MOST_IDS];
        ids.keep(0, MOST_IDS as u64, &many);
        assert_eq!(ids.all(1).map(<[u32]>::len), Some(MOST_IDS));
        ids.keep(1, MOST_IDS as u64 + 1, &[8]);
        assert_eq!((ids.all(2), ids.count(2), ids.len_bytes()), (None, Some(MOST_IDS as u64 + 1), 0));
        // A count that would fit what is kept from now on makes them no more complete.
        ids.keep(2, 1, &[9]);
        assert_eq!((ids.all(3), ids.len_bytes()), (None, 0));
    }
}
