//! What the comparison of an index with a walk over everything finds, for the simulator and tests.

use std::fmt::Debug;

/// An index is not what a walk over everything makes it: an invariant of ours is broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{index}: {kept} is kept, and {walked} is so")]
pub struct IndexMismatch {
    index: &'static str,
    kept: String,
    walked: String,
}

impl IndexMismatch {
    pub fn new(index: &'static str, kept: &impl Debug, walked: &impl Debug) -> Self {
        Self { index, kept: format!("{kept:?}"), walked: format!("{walked:?}") }
    }

    /// # Errors
    /// The two differ.
    pub fn unless_equal<T: Debug + PartialEq>(index: &'static str, kept: &T, walked: &T) -> Result<(), Self> {
        if kept == walked { Ok(()) } else { Err(Self::new(index, kept, walked)) }
    }
}
