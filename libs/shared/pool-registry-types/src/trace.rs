//! By what a request is found again in the logs and traces of everybody whom it came to.
//!
//! The trace is that of W3C Trace Context (<https://www.w3.org/TR/trace-context-2/>): a trace id
//! that all hops share, the id of the span that called, and flags. Whoever calls on passes a
//! [`TraceContext::child`] on: the parent span is another one at each hop, the rest stays. Nothing
//! here draws an id, and nothing reads `tracestate`, which belongs to vendors and is passed on as it came.

use serde::{Deserialize, Serialize};

/// Length of a `traceparent` of version 00: `00-<32>-<16>-<2>`, hexadecimal digits in lower case.
const LENGTH: usize = 55;
/// `sampled` and `random`. The others have no meaning yet, and are passed on as zero.
const KNOWN_FLAGS: u8 = 0b11;
/// Longest `tracestate` that is passed on, bytes. Source: .specs/01 CLOUD-1943.
pub const MAX_TRACESTATE_BYTES: usize = 512;

/// The trace that a request belongs to, and the id by which its client knows it.
///
/// Between daemons and in files an absent field reads as empty: the request runs without it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceContext {
    /// As version 00 of W3C Trace Context writes it.
    #[serde(default)]
    pub traceparent: String,
    /// 1 to 128 visible ASCII characters.
    #[serde(default)]
    pub correlation_id: String,
    /// What vendors say of the trace, by [`read_tracestate`]; empty where they say nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tracestate: String,
}

impl TraceContext {
    /// 32 hexadecimal digits; empty where there is no trace.
    pub fn trace_id(&self) -> &str {
        self.traceparent.get(3..35).unwrap_or_default()
    }

    /// The trace's id, the calling span's and the flags; nothing where there is no trace.
    pub fn ids(&self) -> Option<(u128, u64, u8)> {
        let [trace_id, span_id, flags] = [3..35, 36..52, 53..LENGTH].map(|part| self.traceparent.get(part));
        let trace_id = u128::from_str_radix(trace_id?, 16).ok()?;
        let span_id = u64::from_str_radix(span_id?, 16).ok()?;
        Some((trace_id, span_id, u8::from_str_radix(flags?, 16).ok()?))
    }

    /// What is passed on by the span `span_id` of the same trace. 0 names no span, and counts as 1.
    #[must_use]
    pub fn child(&self, span_id: u64) -> Self {
        let parts = (self.traceparent.get(..36), self.traceparent.get(52..LENGTH));
        let traceparent = match parts {
            (Some(trace), Some(flags)) => format!("{trace}{:016x}{flags}", span_id.max(1)),
            _ => self.traceparent.clone(),
        };
        Self { traceparent, ..self.clone() }
    }
}

/// The headers `tracestate` that came with a request, as one; nothing where they are none. Of vendors'
/// lists no member may be left out in the middle, so what is too long goes whole.
pub fn read_tracestate<'t>(headers: impl IntoIterator<Item = &'t str>) -> Option<String> {
    let mut all = String::new();
    for list in headers.into_iter().map(|list| list.trim_matches([' ', '\t'])).filter(|list| !list.is_empty())
    {
        if all.len() + list.len() + 1 > MAX_TRACESTATE_BYTES + usize::from(all.is_empty()) {
            return None;
        }
        if !all.is_empty() {
            all.push(',');
        }
        all.push_str(list);
    }
    let is_text = all.bytes().all(|b| b == b'\t' || (b' '..=b'~').contains(&b));
    (is_text && !all.is_empty()).then_some(all)
}

/// A `traceparent` of version 00. Neither id may be 0, which is none.
pub fn traceparent(trace_id: u128, span_id: u64, flags: u8) -> String {
    format!("00-{trace_id:032x}-{span_id:016x}-{flags:02x}")
}

/// A `traceparent` that came with a request, as version 00 writes it; nothing where it is none. Of a
/// later version what version 00 knows is read, and it may be longer; version `ff` is none.
pub fn read_traceparent(text: &str) -> Option<String> {
    let (known, more) = text.split_at_checked(LENGTH)?;
    let parts: Vec<&str> = known.split('-').collect();
    let &[version, trace_id, span_id, flags] = parts.as_slice() else { return None };
    let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let lengths = [version.len(), trace_id.len(), span_id.len(), flags.len()];
    if lengths != [2, 32, 16, 2] || !parts.iter().all(|part| digits(part)) {
        return None;
    }
    let ends = if version == "00" { more.is_empty() } else { more.is_empty() || more.starts_with('-') };
    if version == "ff" || !ends {
        return None;
    }
    let trace_id = u128::from_str_radix(trace_id, 16).ok().filter(|id| *id != 0)?;
    let span_id = u64::from_str_radix(span_id, 16).ok().filter(|id| *id != 0)?;
    let flags = u8::from_str_radix(flags, 16).ok()?;
    Some(traceparent(trace_id, span_id, flags & KNOWN_FLAGS))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";

    // CLOUD-1150
    #[test]
    fn a_traceparent_is_read_by_the_rules_of_its_version() {
        let of = |flags: &str| Some(format!("00-{TRACE}-{SPAN}-{flags}"));
        for (text, read) in [
            (format!("00-{TRACE}-{SPAN}-01"), of("01")),
            (format!("00-{TRACE}-{SPAN}-00"), of("00")),
            // Flags without a meaning are passed on as zero.
            (format!("00-{TRACE}-{SPAN}-ff"), of("03")),
            // A later version may say more behind another dash, and only there.
            (format!("01-{TRACE}-{SPAN}-01"), of("01")),
            (format!("cc-{TRACE}-{SPAN}-01-what-the-future-brings"), of("01")),
            (format!("cc-{TRACE}-{SPAN}-01."), None),
            (format!("cc-{TRACE}-{SPAN}-011"), None),
            (format!("00-{TRACE}-{SPAN}-01-more"), None),
            (format!("00-{TRACE}-{SPAN}-01-"), None),
            (format!("ff-{TRACE}-{SPAN}-01"), None),
            (format!("00-{}-{SPAN}-01", "0".repeat(32)), None),
            (format!("00-{TRACE}-{}-01", "0".repeat(16)), None),
            (format!("00-{}-{SPAN}-01", TRACE.to_uppercase()), None),
            (format!("00-+{}-{SPAN}-01", &TRACE[1..]), None),
            (format!("00-{TRACE}-{SPAN}-0"), None),
            (format!("00-{TRACE}-{SPAN}-0g"), None),
            (format!("00_{TRACE}_{SPAN}_01"), None),
            (format!("0-0{TRACE}-{SPAN}-01"), None),
            (format!("00-{TRACE}-{SPAN}-é"), None),
            (String::new(), None),
        ] {
            assert_eq!(read_traceparent(&text), read, "{text}");
        }
    }

    // CLOUD-1151
    #[test]
    fn a_child_has_another_parent_and_the_same_trace_flags_and_correlation_id() {
        let trace = TraceContext {
            traceparent: format!("00-{TRACE}-{SPAN}-01"),
            correlation_id: "order 7".into(),
            tracestate: "vendor=x".into(),
        };
        assert_eq!(trace.trace_id(), TRACE);
        assert_eq!(trace.child(7).tracestate, "vendor=x");
        let child = trace.child(0x2a);
        assert_eq!(child.traceparent, format!("00-{TRACE}-000000000000002a-01"));
        assert_eq!((child.trace_id(), child.correlation_id.as_str()), (TRACE, "order 7"));
        assert_eq!(trace.child(0).traceparent, format!("00-{TRACE}-0000000000000001-01"));
        for span in [1, u64::MAX] {
            let child = child.child(span).traceparent;
            assert_eq!(read_traceparent(&child).as_ref(), Some(&child), "what is passed on is valid");
        }
    }

    // CLOUD-1943
    #[test]
    fn what_vendors_say_is_passed_on_as_it_came_and_whole() {
        let read = |headers: &[&str]| read_tracestate(headers.iter().copied());
        assert_eq!(read(&["a=1,b@c=2 3", " d=4\t"]).as_deref(), Some("a=1,b@c=2 3,d=4"));
        assert_eq!(
            read(&[&"x".repeat(MAX_TRACESTATE_BYTES)]).map(|all| all.len()),
            Some(MAX_TRACESTATE_BYTES)
        );
        let half = "x".repeat(MAX_TRACESTATE_BYTES / 2);
        let long = "x".repeat(MAX_TRACESTATE_BYTES + 1);
        for none in [&[][..], &[""], &[" "], &["a=\u{e4}"], &["a=\n"], &[long.as_str()], &[&half, &half]] {
            assert_eq!(read(none), None, "{none:?}");
        }
    }

    // CLOUD-1151
    #[test]
    fn a_trace_that_is_not_there_or_unreadable_costs_nothing_but_itself() {
        let absent: TraceContext = serde_json::from_str(r#"{"of_a_newer_daemon": 1}"#).unwrap();
        assert_eq!((absent.trace_id(), absent.child(7)), ("", absent.clone()));
        let odd =
            TraceContext { traceparent: "é".repeat(40), correlation_id: "c".into(), ..Default::default() };
        assert_eq!((odd.trace_id(), odd.child(7)), ("", odd.clone()));
        let json = serde_json::to_string(&odd.child(7)).unwrap();
        assert_eq!(serde_json::from_str::<TraceContext>(&json).unwrap(), odd);
    }
}
