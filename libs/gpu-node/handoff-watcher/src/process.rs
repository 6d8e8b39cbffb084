//! Whether the process that a handoff names is still the same one.
//!
//! A process id is used again after its process has ended, so it counts only together with
//! the time the process started. Source of the fields: proc(5).

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

/// Clock ticks a second in /proc; fixed at 100 in the kernel's interface to user space.
const TICKS_PER_SECOND: u64 = 100;
/// A file may be written this much before its process shows, by the clocks' granularity.
const SLACK: Duration = Duration::from_secs(2);

/// When a process started, in ticks since the machine's boot; nothing when there is none. An
/// error says only that it could not be found out.
pub(crate) fn start_ticks(pid: u32) -> std::io::Result<Option<u64>> {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => Ok(parse_start(&stat)),
        // A process that ends while it is read is "no such process" (3).
        Err(error) if error.kind() == std::io::ErrorKind::NotFound || error.raw_os_error() == Some(3) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The parent of a process; nothing when there is none, or it ends meanwhile.
pub fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    fields(&stat)?.nth(1)?.parse().ok()
}

/// The fields from the third on, which is the state.
fn fields(stat: &str) -> Option<std::str::SplitWhitespace<'_>> {
    // The command's name may hold spaces and brackets: the fields after it start at the last bracket.
    Some(stat.rsplit_once(')')?.1.split_whitespace())
}

fn parse_start(stat: &str) -> Option<u64> {
    let mut fields = fields(stat)?;
    if fields.next()? == "Z" {
        return None;
    }
    // State is field 3 and the start time field 22.
    fields.nth(18)?.parse().ok()
}

/// Whether the process is older than the file that names it.
pub(crate) fn is_older_than(start_ticks: u64, file: SystemTime) -> bool {
    let boot = std::fs::read_to_string("/proc/stat").ok().and_then(|stat| {
        stat.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse::<u64>().ok())
    });
    let Some(boot) = boot else { return true };
    let started = SystemTime::UNIX_EPOCH + Duration::from_secs(boot + start_ticks / TICKS_PER_SECOND);
    started <= file + SLACK
}

/// Whether a process of the same user listens on the port, on the network that the process has.
pub(crate) fn listens(pid: u32, port: u16) -> bool {
    let Ok(about) = std::fs::metadata(format!("/proc/{pid}")) else { return false };
    let tables = ["tcp", "tcp6"].map(|table| std::fs::read_to_string(format!("/proc/{pid}/net/{table}")));
    let of_table = |table: String| table.lines().any(|line| is_listener(line, port, about.uid()));
    tables.into_iter().flatten().any(of_table)
}

/// A line of a table of connections: its number, both addresses, the state, three pairs, and the user.
fn is_listener(line: &str, port: u16, uid: u32) -> bool {
    const LISTEN: &str = "0A";
    let mut fields = line.split_whitespace().skip(1);
    let (Some(local), Some(_), Some(state)) = (fields.next(), fields.next(), fields.next()) else {
        return false;
    };
    let local = local.rsplit_once(':').and_then(|(_, port)| u16::from_str_radix(port, 16).ok());
    let of_user = fields.nth(3).and_then(|uid| uid.parse().ok());
    state == LISTEN && local == Some(port) && of_user == Some(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_started_and_no_process_has_the_largest_id() {
        let ticks = start_ticks(std::process::id()).unwrap().unwrap();
        assert!(ticks > 0);
        assert_eq!(start_ticks(u32::MAX).unwrap(), None);
    }

    // CLOUD-2005
    #[test]
    fn a_process_that_started_long_after_the_file_is_not_its_own() {
        let ticks = start_ticks(std::process::id()).unwrap().unwrap();
        assert!(is_older_than(ticks, SystemTime::now()));
        assert!(!is_older_than(ticks, SystemTime::UNIX_EPOCH + Duration::from_secs(1)));
    }

    // CLOUD-2688
    #[test]
    fn a_process_listens_on_its_port_and_on_no_other() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let own = std::process::id();
        assert!(listens(own, port) && !listens(u32::MAX, port));
        drop(listener);
        assert!(!listens(own, port));
    }
}
