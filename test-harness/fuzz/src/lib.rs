//! What the fuzz targets share: what a parser takes of memory, and JSON that comes back the same.
//!
//! A target states a property of one parser and panics where it does not hold; `cargo xtask fuzz`
//! builds and runs them. The inputs in `corpus` are kept: seeds by hand, and what libFuzzer found
//! to reach more, made small with `-merge=1`. Nothing here knows libFuzzer.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt::Debug;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use daemon_kit::extract::parse;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub mod streams;

static HELD: AtomicUsize = AtomicUsize::new(0);
static HIGHEST: AtomicUsize = AtomicUsize::new(0);
static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, which counts: libFuzzer's own limits see neither small waste nor work
/// that grows with the square of the input.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn took(bytes: usize) {
    let held = HELD.fetch_add(bytes, Relaxed) + bytes;
    HIGHEST.fetch_max(held, Relaxed);
    TAKEN.fetch_add(bytes, Relaxed);
}

// SAFETY: every call is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both may stand side by side while the content moves.
        took(size);
        HELD.fetch_sub(layout.size(), Relaxed);
        unsafe { System.realloc(at, layout, size) }
    }
}

/// What a piece of work took of memory, bytes.
#[derive(Debug, Clone, Copy)]
pub struct Spent {
    /// Most that was held at one time.
    pub highest: usize,
    /// All that was asked for, freed or not.
    pub taken: usize,
}

/// Runs `work` and says what it took. One thread at a time.
pub fn measure<T>(work: impl FnOnce() -> T) -> (T, Spent) {
    let held = HELD.load(Relaxed);
    let taken = TAKEN.load(Relaxed);
    HIGHEST.store(held, Relaxed);
    let value = work();
    let highest = HIGHEST.load(Relaxed).saturating_sub(held);
    (value, Spent { highest, taken: TAKEN.load(Relaxed) - taken })
}

/// Reads a body as the daemons do. What is taken is an object, and comes back as the same value
/// from its own JSON, which is longer by at most the `defaults`, bytes, than what it was read from.
pub fn read_json<T>(body: &[u8], defaults: usize) -> Option<T>
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let value: T = parse(body).ok()?;
    assert_eq!(first(body), Some(b'{'), "a body that is no object was taken");
    let text = serde_json::to_vec(&value).expect("what was read can be written");
    // A struct may be given as an array, without the names of its fields.
    let most = 4 * body.len() + defaults;
    assert!(text.len() <= most, "{} bytes became {}", body.len(), text.len());
    let again: T = match parse(&text) {
        Ok(again) => again,
        Err(error) => panic!("{} is refused: {}", String::from_utf8_lossy(&text), error.0.message),
    };
    assert_eq!(value, again, "another value comes back");
    Some(value)
}

fn first(body: &[u8]) -> Option<u8> {
    body.iter().copied().find(|byte| !byte.is_ascii_whitespace())
}
