//! The bounds of what one side of a connection can make the other one keep.
//!
//! Whoever can send something can send too much of it. What a peer, an engine or a client can fill
//! has its bound here, and whoever holds it counts it. Bounds that only one crate can reach (a
//! frame's, a record's, a file's) stand beside what they bound.

/// Longest answer of a daemon to the other one that is read, bytes: to a registration, a heartbeat,
/// an order, a probe.
pub const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// Answers of known length that their peers have not taken, of all connections of a daemon together, bytes;
/// half of them of one holder. Source: .specs/01 CLOUD-2771.
pub const MAX_UNREAD_ANSWER_BYTES: usize = 32 * 1024 * 1024;
/// Pools of one report, the handoff files that a node reads and the entries of its file of pools among
/// them. Source, as of the others of a report: .specs/01 CLOUD-2722.
pub const MAX_REPORT_POOLS: usize = 2_048;
/// Replicas of all pools of one report.
pub const MAX_REPORT_REPLICAS: usize = 4_096;
/// Names by which one pool is asked for.
pub const MAX_POOL_MODELS: usize = 4_096;
/// The same of all pools of one report, and models on one node's disk.
pub const MAX_REPORT_MODELS: usize = 8_192;
/// New names of models that one node brings within a lease and that are remembered.
/// Source: .specs/01 CLOUD-2723.
pub const MAX_NEW_MODELS: usize = MAX_REPORT_MODELS;
/// Names of models that are remembered of all nodes together; one takes some 400 bytes.
pub const MAX_KNOWN_MODELS: usize = 128 * 1024;
/// Attempts of one report: those that run, and those that are held.
pub const MAX_REPORT_ATTEMPTS: usize = 100_000;
/// Lines of an engine's log in the report of its pool.
pub const MAX_TAIL_LINES: usize = 64;
/// GPUs of one node.
pub const MAX_GPUS: usize = 256;
/// Files of one node that cannot be taken as they stand, in a report.
pub const MAX_PROBLEMS: usize = 64;
/// Labels of one node, and its features.
pub const MAX_LABELS: usize = 64;

/// What a task counts for beside its payload until it has ended, bytes: what is known of it, its log's
/// beginning and its place in lists. Source: .specs/01 CLOUD-2725.
pub const TASK_BYTES: usize = 4 * 1024;
/// What the last reports of all nodes of one token may take together whose nodes are bounded, bytes; each
/// thing that they name counts as so many beside its text. Source: .specs/01 CLOUD-2779.
pub const MAX_REPORTED_BYTES: usize = 8 * 1024 * 1024;
// Else a list of nodes is refused to everybody for what one token's nodes report.
const _: () = assert!(MAX_REPORTED_BYTES <= MAX_UNREAD_ANSWER_BYTES / 4);
pub const REPORTED_ITEM_BYTES: usize = 512;

/// Tokens that one event of an engine may bring beside those that its text shows: half characters, the
/// beginning of a stop text, what has no text. Source: .specs/01 CLOUD-2724.
pub const MAX_HIDDEN_TOKENS: usize = 64;

/// Tokens that a piece of text may stand for, with so many events of the engine since the one before.
pub fn most_tokens(text_bytes: usize, events: u64) -> u64 {
    (text_bytes as u64).saturating_add(events.saturating_mul(MAX_HIDDEN_TOKENS as u64))
}

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
