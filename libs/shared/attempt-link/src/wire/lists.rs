//! Lists that are bounded while they are read.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, SeqAccess, Visitor};
use serde::ser::{Serialize, SerializeTuple, Serializer};

use super::{MAX_IDS, MAX_SEEN};
use crate::content::Position;

struct Bounded<T>(usize, PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Bounded<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {}", self.0)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut read = Vec::new();
        while let Some(entry) = list.next_element()? {
            if read.len() == self.0 {
                return Err(A::Error::invalid_length(self.0 + 1, &self));
            }
            read.push(entry);
        }
        Ok(read)
    }
}

/// A list of at most `most` entries.
pub(super) fn bounded<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
    most: usize,
) -> Result<Vec<T>, D::Error> {
    deserializer.deserialize_seq(Bounded(most, PhantomData))
}

pub(super) fn ids<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    bounded(deserializer, MAX_IDS)
}

pub(super) fn seen<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Position>, D::Error> {
    bounded(deserializer, MAX_SEEN)
}

impl Serialize for Position {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut pair = serializer.serialize_tuple(2)?;
        pair.serialize_element(&self.number)?;
        pair.serialize_element(&self.next)?;
        pair.end()
    }
}

impl<'de> Deserialize<'de> for Position {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pair;

        impl<'de> Visitor<'de> for Pair {
            type Value = Position;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number and an index")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut pair: A) -> Result<Position, A::Error> {
                let missing = |at| A::Error::invalid_length(at, &"a number and an index");
                let number = pair.next_element()?.ok_or_else(|| missing(0))?;
                let next = pair.next_element()?.ok_or_else(|| missing(1))?;
                // A newer writer may say more of an attempt.
                while pair.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Position { number, next })
            }
        }

        deserializer.deserialize_seq(Pair)
    }
}
