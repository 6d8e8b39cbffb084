//! Reading what a newer daemon writes.
//!
//! Between the daemons, words that this reader does not know cost only what they stand in: an
//! entry is left out of its list, an optional value reads as absent. Clients and operators are read
//! strictly, since a misspelt option must not be ignored; so these functions are named by fields
//! of messages between the daemons, and the types of single values stay strict. Source: .specs/01
//! CLOUD-1109.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, Deserializer, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};
use serde_json::{Map, Value};

/// A value that reads as absent where it is not what this reader knows.
pub(crate) fn option<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    Ok(serde_json::from_value(Value::deserialize(deserializer)?).ok())
}

/// A list without the entries that this reader cannot read. What is no list at all is an error:
/// an empty one would say that nothing is there.
pub(crate) fn entries<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    struct Entries<T>(PhantomData<T>);

    impl<'de, T: DeserializeOwned> Visitor<'de> for Entries<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
            let mut read = Vec::new();
            // One at a time, so that what is left out takes no memory.
            while let Some(entry) = list.next_element::<Value>()? {
                if let Ok(entry) = serde_json::from_value::<T>(entry) {
                    read.push(entry);
                }
            }
            Ok(read)
        }
    }

    deserializer.deserialize_seq(Entries(PhantomData))
}

/// Leaves a field out whose value this reader does not know.
pub(crate) fn drop_unknown<T: DeserializeOwned>(object: &mut Map<String, Value>, name: &str) {
    if object.get(name).is_some_and(|value| T::deserialize(value).is_err()) {
        object.remove(name);
    }
}

/// Leaves out the fields that `T` does not have.
pub(crate) fn keep_fields_of<T: DeserializeOwned>(object: &mut Map<String, Value>) {
    let names: Cell<&'static [&'static str]> = Cell::new(&[]);
    // It never gives a value: the names are all that is asked for.
    let _ = T::deserialize(FieldNames(&names));
    object.retain(|name, _| names.get().contains(&name.as_str()));
}

/// Learns how the fields of a struct are called.
struct FieldNames<'n>(&'n Cell<&'static [&'static str]>);

impl<'de> Deserializer<'de> for FieldNames<'_> {
    type Error = serde::de::value::Error;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Self::Error> {
        self.0.set(fields);
        Err(Self::Error::custom("there is no value"))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
        Err(Self::Error::custom("there is no value"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
