//! Calls as the edge of a daemon has answered them: how long each route took, what was refused, and to whom.
//!
//! No label is a client's word: routes are as they are routed, methods are HTTP's own.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request};
use axum::http::{Method, StatusCode};
use axum::response::Response;
use parking_lot::Mutex;
use pool_registry_types::ErrorCode;
use prometheus::{HistogramVec, IntCounterVec};

use crate::connections::Peer;
use crate::metrics::{HTTP_REQUEST_DURATION, REFUSED_CALLS};

/// Why calls are refused for whoever makes them.
const REFUSALS: [ErrorCode; 4] =
    [ErrorCode::MissingToken, ErrorCode::BadToken, ErrorCode::Forbidden, ErrorCode::RateLimited];
/// What nothing is routed to.
const NO_ROUTE: &str = "other";
/// A peer that was refused has a line again after this.
const LINE_EVERY: Duration = Duration::from_secs(60);
/// Peers that have lines; those beyond are counted, and the count has one.
const PEERS: usize = 1_024;
/// A crowd of strangers does not have all of them looked through for each of its calls.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// What is counted since the start, and of whom the log has had a line.
#[derive(Debug)]
pub struct Calls {
    pub(crate) durations: HistogramVec,
    pub(crate) refused: IntCounterVec,
    peers: Mutex<Peers>,
}

impl Default for Calls {
    fn default() -> Self {
        let refused = REFUSED_CALLS.counter();
        // Shown from the start: a series that is not there yet has no first increase.
        for code in REFUSALS {
            refused.with_label_values(&[code.as_str(), NO_ROUTE]);
        }
        Self { durations: HTTP_REQUEST_DURATION.histogram(), refused, peers: Mutex::default() }
    }
}

/// A call that has come and is not answered yet.
#[derive(Debug)]
pub(crate) struct Arrived {
    at: Instant,
    method: &'static str,
    route: Option<MatchedPath>,
    peer: Option<Arc<Peer>>,
}

impl Arrived {
    pub(crate) fn of(request: &Request) -> Self {
        Self {
            at: Instant::now(),
            method: method(request.method()),
            route: request.extensions().get::<MatchedPath>().cloned(),
            peer: request.extensions().get::<Arc<Peer>>().cloned(),
        }
    }

    pub(crate) fn at(&self) -> Instant {
        self.at
    }

    /// As it is routed.
    pub(crate) fn route(&self) -> &str {
        self.route.as_ref().map_or(NO_ROUTE, MatchedPath::as_str)
    }
}

impl Calls {
    /// The head of the answer is there.
    pub(crate) fn answered(&self, call: &Arrived, response: &Response) {
        let labels = [call.route(), call.method, known_status(response.status())];
        self.durations.with_label_values(&labels).observe(call.at.elapsed().as_secs_f64());
    }

    /// The call is answered with this error. What has nothing to do with who calls is none of this.
    pub(crate) fn refused(&self, call: &Arrived, code: ErrorCode) {
        if !REFUSALS.contains(&code) {
            return;
        }
        let route = call.route();
        self.refused.with_label_values(&[code.as_str(), route]).inc();
        let Some(peer) = &call.peer else { return };
        let ip = peer.addr.ip().to_canonical();
        let line = self.peers.lock().refused(ip, call.at);
        match line {
            Line::None => {}
            Line::Peer { more } => {
                tracing::info!(peer = %ip, path = route, %code, more, "{ip} was refused on {route}: {code}");
            }
            Line::Others { calls } => {
                tracing::info!(
                    calls,
                    "more than {PEERS} peers were refused within a minute, these calls are of others"
                );
            }
        }
    }
}

/// What the log is to have of a refused call.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    None,
    /// And so many calls of this peer were refused since its last line.
    Peer {
        more: u64,
    },
    /// So many calls of peers that have no line.
    Others {
        calls: u64,
    },
}

/// Those that were refused of late.
#[derive(Debug, Default)]
struct Peers {
    /// When each had its last line, and its calls since then.
    known: HashMap<IpAddr, (Instant, u64)>,
    /// Of those that found no place, and when that had its last line.
    others: (Option<Instant>, u64),
    /// When those whose minute is over were last let go.
    swept: Option<Instant>,
}

impl Peers {
    fn refused(&mut self, peer: IpAddr, now: Instant) -> Line {
        let is_due = |at: Instant| now.saturating_duration_since(at) >= LINE_EVERY;
        if let Some((at, more)) = self.known.get_mut(&peer) {
            if !is_due(*at) {
                *more += 1;
                return Line::None;
            }
            *at = now;
            return Line::Peer { more: std::mem::take(more) };
        }
        let is_long_ago = |at| now.saturating_duration_since(at) >= SWEEP_EVERY;
        if self.known.len() >= PEERS && self.swept.is_none_or(is_long_ago) {
            self.known.retain(|_, (at, _)| !is_due(*at));
            self.swept = Some(now);
        }
        if self.known.len() < PEERS {
            self.known.insert(peer, (now, 0));
            return Line::Peer { more: 0 };
        }
        let (at, calls) = &mut self.others;
        *calls += 1;
        if !at.is_none_or(is_due) {
            return Line::None;
        }
        *at = Some(now);
        Line::Others { calls: std::mem::take(calls) }
    }
}

fn method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::PATCH => "PATCH",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

/// An engine's own status may be passed on: what HTTP does not name is one.
fn known_status(status: StatusCode) -> &'static str {
    const FIRST: u16 = 100;
    static TEXTS: std::sync::LazyLock<Vec<String>> =
        std::sync::LazyLock::new(|| (FIRST..600).map(|code| code.to_string()).collect());
    let is_named = status.canonical_reason().is_some();
    let text = is_named.then(|| TEXTS.get(usize::from(status.as_u16() - FIRST))).flatten();
    text.map_or("other", String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Page;
    use axum::response::IntoResponse;

    // CLOUD-2696
    #[test]
    fn a_peer_has_one_line_a_minute_and_a_crowd_has_one_for_all_beyond_its_bound() {
        let (mut peers, start) = (Peers::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let ip = |n: u32| IpAddr::from(std::net::Ipv4Addr::from(n));
        assert_eq!(peers.refused(ip(1), at(0)), Line::Peer { more: 0 });
        assert_eq!((1..60).filter(|second| peers.refused(ip(1), at(*second)) != Line::None).count(), 0);
        assert_eq!(peers.refused(ip(2), at(59)), Line::Peer { more: 0 }, "another has its own");
        assert_eq!(peers.refused(ip(1), at(60)), Line::Peer { more: 59 });
        let lines: Vec<Line> = (10..100_000).map(|n| peers.refused(ip(n), at(61))).collect();
        assert_eq!(lines.iter().filter(|line| **line == Line::Peer { more: 0 }).count(), PEERS - 2);
        assert_eq!(lines.iter().filter(|line| **line == Line::Others { calls: 1 }).count(), 1);
        assert_eq!(peers.known.len(), PEERS);
        assert_eq!(peers.refused(ip(200_000), at(140)), Line::Peer { more: 0 }, "the old ones have gone");
        assert_eq!(peers.known.len(), 1);
    }

    // CLOUD-2710
    #[test]
    fn ten_thousand_invented_paths_methods_and_peers_make_one_series() {
        let calls = Calls::default();
        for n in 0..10_000_u32 {
            let method = format!("X{n}");
            let mut request = Request::builder().method(method.as_str()).uri(format!("/made/up/{n}"));
            let addr = (std::net::Ipv4Addr::from(n), 1).into();
            request = request.extension(Arc::new(Peer { addr, certificate: None }));
            let arrived = Arrived::of(&request.body(axum::body::Body::empty()).unwrap());
            calls.answered(&arrived, &StatusCode::FORBIDDEN.into_response());
            calls.refused(&arrived, ErrorCode::Forbidden);
            calls.refused(&arrived, ErrorCode::Overloaded);
        }
        let mut page = Page::default();
        page.held(&calls.durations).held(&calls.refused);
        let text = page.text().unwrap();
        let of = |name: &str| text.lines().filter(|line| line.starts_with(name)).collect::<Vec<_>>();
        let counted = of("llorch_http_request_duration_seconds_count");
        let labels = "method=\"other\",route=\"other\",status=\"403\"";
        assert_eq!(counted, [format!("llorch_http_request_duration_seconds_count{{{labels}}} 10000")]);
        let refused = of("llorch_refused_calls_total");
        assert_eq!(refused.len(), REFUSALS.len(), "{refused:?}");
        assert!(refused.contains(&"llorch_refused_calls_total{code=\"FORBIDDEN\",route=\"other\"} 10000"));
        let odd = StatusCode::from_u16(599).unwrap();
        assert_eq!((known_status(odd), known_status(StatusCode::OK)), ("other", "200"));
        assert_eq!(known_status(StatusCode::from_u16(999).unwrap()), "other");
    }
}
