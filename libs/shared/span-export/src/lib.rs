//! Spans: what became of a request, told to a collector over OTLP (HTTP, protobuf).
//!
//! Off unless [`start`] was called; then a span costs the question whether it is recorded. A span
//! is made where its work begins or at its end, from the times that are known there, and ends by
//! [`Span::end`]. Ids that another span must know without having seen this one are made of an id that both
//! know: [`id_of`].
//!
//! A collector that is slow or away keeps nobody waiting: spans beyond [`WAITING`] are counted and gone, and
//! so are those of a batch that it did not take.

mod exporter;
mod span;

pub use exporter::{Settings, StartError, lost, start, stop};
pub use span::{Asked, GONE, Kind, Span, StringValue, Value, flags_of_new_trace, id_of, is_on, is_recorded};

/// Spans that may wait for the collector.
pub const WAITING: usize = 4096;
