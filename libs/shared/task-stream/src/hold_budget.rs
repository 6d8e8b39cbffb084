//! Answers that are held back until they are whole, counted together over all relays.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// So many bytes for all answers that are held back.
#[derive(Debug)]
pub struct HoldBudget {
    most: usize,
    held: AtomicUsize,
}

impl HoldBudget {
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, held: AtomicUsize::new(0) })
    }

    /// Bytes that are held back.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }
}

/// What one answer has of it; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct HeldBack {
    of: Arc<HoldBudget>,
    bytes: usize,
}

impl HeldBack {
    pub(crate) fn new(of: Arc<HoldBudget>) -> Self {
        Self { of, bytes: 0 }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// So many more. Returns whether there was room for them; else nothing is counted.
    pub(crate) fn add(&mut self, bytes: usize) -> bool {
        let with = |held: usize| held.checked_add(bytes).filter(|held| *held <= self.of.most);
        let has_room = self.of.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, with).is_ok();
        self.bytes += if has_room { bytes } else { 0 };
        has_room
    }

    /// Nothing is held back any more.
    pub(crate) fn release(&mut self) {
        self.of.held.fetch_sub(std::mem::take(&mut self.bytes), Ordering::Relaxed);
    }
}

impl Drop for HeldBack {
    fn drop(&mut self) {
        self.release();
    }
}
