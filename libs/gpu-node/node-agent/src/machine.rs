//! The machine's own memory. Source: proc(5), `/proc/meminfo`.

/// Bytes in all, and bytes that could be had; nothing where the system does not say.
pub(crate) fn memory() -> Option<(u64, Option<u64>)> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let bytes = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
    };
    Some((bytes("MemTotal:")?, bytes("MemAvailable:")))
}
