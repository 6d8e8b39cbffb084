//! One span: made where something begins, or where it has ended.

use std::borrow::Cow;
use std::time::{Instant, SystemTime};

use opentelemetry::KeyValue;
use opentelemetry::trace::{
    Event, Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState,
};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};
use pool_registry_types::TraceContext;
use pool_registry_types::trace::traceparent;
use uuid::Uuid;

use crate::exporter::Exporter;

pub use opentelemetry::{StringValue, Value};

/// `sampled`: whoever has begun the trace wants it recorded.
const SAMPLED: u8 = 1;

/// Why a span ends whose caller has gone.
pub const GONE: &str = "client gone";

/// Whether spans are exported at all.
pub fn is_on() -> bool {
    Exporter::get().is_some()
}

/// Who the work of a span is done for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nobody outside of this process.
    Internal,
    /// Whoever has called.
    Server,
    /// This process, by another.
    Client,
}

/// What is to be said of some work. Dropped without [`Span::end`], nothing is.
#[derive(Debug)]
pub struct Span {
    data: Box<SpanData>,
    began: Instant,
}

/// The id of the span of what this id names: who knows the one knows the other.
pub fn id_of(id: Uuid) -> u64 {
    let (high, low) = id.as_u64_pair();
    // Of ids that are counted only the end differs.
    (high ^ low).max(1)
}

/// Whether spans of this trace are recorded here.
pub fn is_recorded(trace: &TraceContext) -> bool {
    Exporter::get().is_some() && trace.ids().is_some_and(|(_, _, flags)| flags & SAMPLED != 0)
}

/// Flags of a trace that begins here. Where nothing is recorded here, others may want to.
pub fn flags_of_new_trace(trace_id: u128) -> u8 {
    match Exporter::get() {
        Some(exporter) if !is_drawn(trace_id, exporter.sample) => 0,
        _ => SAMPLED,
    }
}

/// Whether the trace belongs to this share of all, the same everywhere. Its last seven bytes count, which are
/// random where anything of it is.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a share of 56 bits"
)]
fn is_drawn(trace_id: u128, share: f64) -> bool {
    const ALL: u64 = 1 << 56;
    share >= 1.0 || (trace_id as u64 % ALL) < (share * ALL as f64) as u64
}

impl Span {
    /// Of the trace, called by its span. Nothing where that is not recorded.
    pub fn of(trace: &TraceContext, name: impl Into<Cow<'static, str>>, kind: Kind) -> Option<Self> {
        let exporter = Exporter::get()?;
        let (trace_id, parent, flags) = trace.ids().filter(|(_, _, flags)| flags & SAMPLED != 0)?;
        Some(Self::new(exporter, (trace_id, parent, flags), name.into(), kind))
    }

    /// Of a trace that begins with it; nothing where that is not recorded.
    pub fn first(name: impl Into<Cow<'static, str>>, kind: Kind) -> Option<Self> {
        let exporter = Exporter::get()?;
        let trace_id = Uuid::new_v4().as_u128();
        is_drawn(trace_id, exporter.sample)
            .then(|| Self::new(exporter, (trace_id, 0, SAMPLED), name.into(), kind))
    }

    fn new(exporter: &Exporter, ids: (u128, u64, u8), name: Cow<'static, str>, kind: Kind) -> Self {
        let (trace_id, parent, flags) = ids;
        let context = SpanContext::new(
            TraceId::from(trace_id),
            SpanId::from(id_of(Uuid::new_v4())),
            TraceFlags::new(flags),
            false,
            TraceState::NONE,
        );
        let now = SystemTime::now();
        let data = SpanData {
            span_context: context,
            parent_span_id: SpanId::from(parent),
            parent_span_is_remote: kind == Kind::Server,
            span_kind: match kind {
                Kind::Internal => SpanKind::Internal,
                Kind::Server => SpanKind::Server,
                Kind::Client => SpanKind::Client,
            },
            name,
            start_time: now,
            end_time: now,
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: exporter.scope.clone(),
        };
        Self { data: Box::new(data), began: Instant::now() }
    }

    /// Its id, where others know it.
    #[must_use]
    pub fn named(mut self, id: u64) -> Self {
        self.data.span_context = self.context_of(id);
        self
    }

    /// The span that it belongs to, where that is not the one of its trace.
    #[must_use]
    pub fn within(mut self, parent: u64) -> Self {
        self.data.parent_span_id = SpanId::from(parent);
        self.data.parent_span_is_remote = false;
        self
    }

    /// When it began, where that was before.
    #[must_use]
    pub fn since(mut self, began: Instant) -> Self {
        self.began = began;
        self
    }

    /// It begins only now.
    pub fn restart(&mut self) {
        self.began = Instant::now();
    }

    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<Value>) -> Self {
        self.set(key, value);
        self
    }

    /// Where there is something to say.
    #[must_use]
    pub fn maybe(self, key: &'static str, value: Option<impl Into<Value>>) -> Self {
        match value {
            Some(value) => self.with(key, value),
            None => self,
        }
    }

    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        self.data.attributes.push(KeyValue::new(key, value));
    }

    /// It goes on with what this other span of the trace has begun.
    #[must_use]
    pub fn after(mut self, other: u64) -> Self {
        let link = Link::with_context(self.context_of(other));
        self.data.links.links.push(link);
        self
    }

    /// Something happened in its course.
    pub fn event(&mut self, name: &'static str, at: Instant) {
        self.data.events.events.push(Event::new(name, wall_clock(at), Vec::new(), 0));
    }

    /// It has failed. `why`: a code of ours, no text of anybody else.
    #[must_use]
    pub fn failed(mut self, why: impl Into<Cow<'static, str>>) -> Self {
        let why = why.into();
        self.set("error.type", why.clone());
        self.data.status = Status::error(why);
        self
    }

    /// Its id.
    pub fn id(&self) -> u64 {
        u64::from_be_bytes(self.data.span_context.span_id().to_bytes())
    }

    /// What goes with a call that is made within it.
    pub fn traceparent(&self) -> String {
        let context = &self.data.span_context;
        let trace_id = u128::from_be_bytes(context.trace_id().to_bytes());
        traceparent(trace_id, self.id(), context.trace_flags().to_u8())
    }

    /// It ends now.
    pub fn end(self) {
        self.end_at(Instant::now());
    }

    /// It has ended.
    pub fn end_at(mut self, at: Instant) {
        let Some(exporter) = Exporter::get() else { return };
        let end = wall_clock(at.max(self.began));
        self.data.start_time = end.checked_sub(at.saturating_duration_since(self.began)).unwrap_or(end);
        self.data.end_time = end;
        exporter.take(*self.data);
    }

    fn context_of(&self, id: u64) -> SpanContext {
        let context = &self.data.span_context;
        SpanContext::new(context.trace_id(), SpanId::from(id), context.trace_flags(), false, TraceState::NONE)
    }
}

/// The span of a call that this process makes, which ends when whoever waits for the answer has gone, too.
#[derive(Debug)]
pub struct Asked(Option<Span>);

impl Asked {
    /// Of the trace; it is none where that is not recorded.
    pub fn of(trace: &TraceContext, name: &'static str) -> Self {
        Self(Span::of(trace, name, Kind::Client))
    }

    pub fn id(&self) -> Option<u64> {
        self.0.as_ref().map(Span::id)
    }

    /// There is an answer; `failed`: its error's code.
    pub fn answered(mut self, failed: Option<&'static str>, more: impl FnOnce(Span) -> Span) {
        if let Some(span) = self.0.take() {
            let span = more(span);
            match failed {
                Some(code) => span.failed(code).end(),
                None => span.end(),
            }
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(span) = self.0.take() {
            span.failed(GONE).end();
        }
    }
}

/// When that was, by the clock on the wall as it is now.
fn wall_clock(at: Instant) -> SystemTime {
    let (now, wall) = (Instant::now(), SystemTime::now());
    if at > now {
        wall.checked_add(at - now).unwrap_or(wall)
    } else {
        wall.checked_sub(now - at).unwrap_or(wall)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // CLOUD-2730
    #[test]
    fn a_share_of_traces_is_drawn_by_their_ids_and_nothing_is_recorded_unless_it_was_started() {
        for (share, least, most) in [(0.0, 0, 0), (0.25, 2_300, 2_700), (1.0, 10_000, 10_000)] {
            let drawn = (0..10_000).filter(|_| is_drawn(Uuid::new_v4().as_u128(), share)).count();
            assert!((least..=most).contains(&drawn), "{share}: {drawn}");
        }
        let id = Uuid::new_v4();
        assert_eq!(is_drawn(id.as_u128(), 0.5), is_drawn(id.as_u128(), 0.5), "every daemon draws alike");
        let (high, low) = id.as_u64_pair();
        assert_eq!((id_of(Uuid::nil()), id_of(id)), (1, high ^ low));
        let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned();
        let trace = TraceContext { traceparent, ..Default::default() };
        assert!(!is_recorded(&trace) && Span::of(&trace, "task", Kind::Internal).is_none());
        assert!(Span::first("engine", Kind::Internal).is_none());
        assert_eq!(flags_of_new_trace(7), SAMPLED, "an engine may record what this daemon does not");
    }
}
