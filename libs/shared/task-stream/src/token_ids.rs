//! The engine's ids of a task's tokens: what a stream that continues from its end begins with.

/// The ids of the tokens in a log, from the first frame on.
#[derive(Debug, Default)]
pub struct TokenIds {
    ids: Vec<u32>,
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
        (self.ids.len() as u64 == count).then_some(self.ids.as_slice())
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.ids.len() * size_of::<u32>()
    }
}
