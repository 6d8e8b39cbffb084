//! The bounds of what one side of a connection can make the other one keep.
//!
//! Whoever can send something can send too much of it. What a peer, an engine or a client can fill
//! has its bound here, and whoever holds it counts it. Bounds that only one crate can reach (a
//! frame's, a record's, a file's) stand beside what they bound.

/// Longest answer of a daemon to the other one that is read, bytes: to a registration, a heartbeat,
/// an order, a probe.
pub const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// What is kept, shown and passed on of one text that another process wrote, bytes: an error's message,
/// a line of an engine's log. Source: .specs/01 CLOUD-2721.
pub const MAX_MESSAGE_BYTES: usize = 1024;

/// Cuts a foreign text at the last character that ends within [`MAX_MESSAGE_BYTES`].
pub fn cut(text: &mut String) {
    if text.len() > MAX_MESSAGE_BYTES {
        // A shorter string in the same memory would keep all of it.
        *text = text[..text.floor_char_boundary(MAX_MESSAGE_BYTES)].to_owned();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2721
    #[test]
    fn a_foreign_text_is_cut_at_the_end_of_a_character_and_gives_its_memory_back() {
        for (long, kept) in [("x".repeat(5_000), 1024), ("€".repeat(5_000), 1023), ("x".repeat(1024), 1024)]
        {
            let mut text = long.clone();
            cut(&mut text);
            assert_eq!(text.len(), kept);
            assert!(long.starts_with(&text) && text.capacity() <= MAX_MESSAGE_BYTES);
        }
    }
}
