//! Reading what a newer daemon writes.
//!
//! Between the daemons, words that this reader does not know cost only what they stand in: an
//! entry is left out of its list, an optional value reads as absent. Clients and operators are read
//! strictly, since a misspelt option must not be ignored; so these functions are named by fields
//! of messages between the daemons, and the types of single values stay strict. Source: .specs/01
//! CLOUD-1109.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, Deserializer, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};
use serde_json::{Map, Value};

use crate::ids::LabelName;
use crate::placement::Labels;
use crate::pool::EngineKind;
use crate::task::{
    ChatMessage, Determinism, KvHint, Priority, Reasoning, Recovery, RerankInputs, TaskRequest, Timeouts,
};

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

/// Labels without those that this reader cannot take.
pub(crate) fn labels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Labels, D::Error> {
    let mut labels = Labels::new();
    for (name, value) in BTreeMap::<String, Value>::deserialize(deserializer)? {
        if let (Ok(name), Ok(value)) = (LabelName::new(&name), serde_json::from_value(value)) {
            labels.insert(name, value);
        }
    }
    Ok(labels)
}

/// The task of an attempt, which a client wrote and a control plane has checked: what this node
/// does not know of it is left out. What says how the task is to be run, and not only how well (its
/// workload, its inputs, the role of a message), must be known.
pub(crate) fn task<'de, D: Deserializer<'de>>(deserializer: D) -> Result<TaskRequest, D::Error> {
    let mut task = Map::<String, Value>::deserialize(deserializer)?;
    keep_fields_of::<TaskRequest>(&mut task);
    // That it came here is all that its constraints were for.
    task.remove("placement");
    drop_unknown::<EngineKind>(&mut task, "engine");
    drop_unknown::<Priority>(&mut task, "priority");
    drop_unknown::<Determinism>(&mut task, "determinism");
    drop_unknown::<Recovery>(&mut task, "recovery");
    drop_unknown::<Reasoning>(&mut task, "reasoning");
    drop_unknown::<KvHint>(&mut task, "kv_hint");
    if let Some(Value::Object(timeouts)) = task.get_mut("timeouts") {
        keep_fields_of::<Timeouts>(timeouts);
    }
    for message in task.get_mut("messages").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Value::Object(message) = message {
            keep_fields_of::<ChatMessage>(message);
        }
    }
    if let Some(Value::Object(rerank)) = task.get_mut("inputs").and_then(|inputs| inputs.get_mut("rerank")) {
        keep_fields_of::<RerankInputs>(rerank);
    }
    serde_json::from_value(Value::Object(task)).map_err(D::Error::custom)
}

fn drop_unknown<T: DeserializeOwned>(object: &mut Map<String, Value>, name: &str) {
    if object.get(name).is_some_and(|value| T::deserialize(value).is_err()) {
        object.remove(name);
    }
}

fn keep_fields_of<T: DeserializeOwned>(object: &mut Map<String, Value>) {
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
