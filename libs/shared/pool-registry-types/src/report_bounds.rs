//! What a node may say at once, and how much of its texts is kept.
//!
//! What is too much is refused, never cut: a list without its end would say that what it leaves out
//! is not there. A node cuts what its engines and its disk make too long before it says so.

use crate::error::ErrorBody;
use crate::limits::{
    MAX_GPUS, MAX_LABELS, MAX_POOL_MODELS, MAX_PROBLEMS, MAX_REPORT_ATTEMPTS, MAX_REPORT_MODELS,
    MAX_REPORT_POOLS, MAX_REPORT_REPLICAS, MAX_TAIL_LINES, cut,
};
use crate::node::{Capabilities, Heartbeat, RegisterRequest};
use crate::pool::PoolReport;

/// `INVALID_PARAMS` where there are more than so many of something.
fn at_most(field: &str, count: usize, most: usize) -> Result<(), ErrorBody> {
    if count > most {
        return Err(ErrorBody::invalid(format!("{field}: {count}, which is more than {most}")));
    }
    Ok(())
}

impl RegisterRequest {
    /// Checks what the types cannot hold. Errors: `INVALID_PARAMS`, naming the field.
    pub fn check(&self) -> Result<(), ErrorBody> {
        at_most("labels", self.labels.len(), MAX_LABELS)?;
        at_most("features", self.features.len(), MAX_LABELS)?;
        at_most("pools", self.pools.len(), MAX_REPORT_POOLS)?;
        at_most("capabilities.gpus", self.capabilities.gpus.len(), MAX_GPUS)
    }

    /// Cuts texts to what is kept of them.
    pub fn cut_texts(&mut self) {
        let Self { version, features, capabilities: Capabilities { gpus, .. }, .. } = self;
        let of_gpus =
            gpus.iter_mut().flat_map(|gpu| [&mut gpu.uuid, &mut gpu.name, &mut gpu.compute_capability]);
        features.iter_mut().chain(of_gpus).chain([version]).for_each(cut);
    }
}

impl Heartbeat {
    /// Checks what the types cannot hold. Errors: `INVALID_PARAMS`, naming the field.
    pub fn check(&self) -> Result<(), ErrorBody> {
        at_most("pools", self.pools.len(), MAX_REPORT_POOLS)?;
        at_most("gpus", self.gpus.len(), MAX_GPUS)?;
        at_most("models", self.models.len(), MAX_REPORT_MODELS)?;
        at_most("problems", self.problems.len(), MAX_PROBLEMS)?;
        let (mut models, mut replicas, mut attempts) = (0, 0, 0);
        for pool in &self.pools {
            at_most("pools.models", pool.models.len(), MAX_POOL_MODELS)?;
            models += pool.models.len();
            replicas += pool.replicas.len();
            attempts += pool.replicas.iter().map(|it| it.attempts.len() + it.held.len()).sum::<usize>();
            if let Some(supervised) = &pool.supervised {
                at_most("pools.supervised.log_tail", supervised.log_tail.len(), MAX_TAIL_LINES)?;
                let loads = supervised.reload.as_ref().map_or(0, |reload| reload.to.len());
                at_most("pools.supervised.reload.to", loads, MAX_POOL_MODELS)?;
            }
        }
        at_most("models of all pools", models, MAX_REPORT_MODELS)?;
        at_most("replicas of all pools", replicas, MAX_REPORT_REPLICAS)?;
        at_most("attempts of all replicas", attempts, MAX_REPORT_ATTEMPTS)
    }

    /// Cuts texts to what is kept of them.
    pub fn cut_texts(&mut self) {
        cut(&mut self.timestamp);
        self.gpus.iter_mut().flat_map(|gpu| &mut gpu.problem).for_each(cut);
        self.problems.iter_mut().flat_map(|problem| [&mut problem.file, &mut problem.message]).for_each(cut);
        self.pools.iter_mut().for_each(PoolReport::cut_texts);
    }

    /// Leaves out what engines, disks and the file of pools have beyond what a report may: names of
    /// models, the oldest lines of logs. For the node that makes it.
    pub fn cut_lists(&mut self) {
        self.gpus.truncate(MAX_GPUS);
        self.models.truncate(MAX_REPORT_MODELS);
        self.problems.truncate(MAX_PROBLEMS);
        let mut left = MAX_REPORT_MODELS;
        for pool in &mut self.pools {
            pool.models.truncate(MAX_POOL_MODELS.min(left));
            left -= pool.models.len();
            if let Some(supervised) = &mut pool.supervised {
                let lines = supervised.log_tail.len();
                supervised.log_tail.drain(..lines.saturating_sub(MAX_TAIL_LINES));
                supervised.reload.iter_mut().for_each(|reload| reload.to.truncate(MAX_POOL_MODELS));
            }
        }
    }
}

impl PoolReport {
    fn cut_texts(&mut self) {
        let Self { engine_version, device_mask, last_error, warning, supervised, .. } = self;
        let own = [engine_version, device_mask, last_error, warning];
        own.into_iter().flatten().for_each(cut);
        if let Some(supervised) = supervised {
            supervised.log_tail.iter_mut().chain(&mut supervised.preparation).for_each(cut);
            supervised.reload.iter_mut().flat_map(|reload| &mut reload.error).for_each(cut);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use utoipa::PartialSchema;
    use uuid::Uuid;

    use super::*;
    use crate::limits::MAX_MESSAGE_BYTES;

    fn registration(change: impl FnOnce(&mut Value)) -> RegisterRequest {
        let mut request = json!({"node_id":"a","machine_id":"a","boot_id":Uuid::nil(),"address":"http://a:1","version":"1","capabilities":{}});
        change(&mut request);
        serde_json::from_value(request).unwrap()
    }

    fn pool(n: usize, change: impl FnOnce(&mut Value)) -> Value {
        let mut pool = json!({"pool_id":format!("p{n}"),"state":"ready","ready":true});
        change(&mut pool);
        pool
    }

    fn beat(pools: Vec<Value>) -> Heartbeat {
        serde_json::from_value(json!({"epoch":"e","seq":1,"timestamp":"","pools":pools})).unwrap()
    }

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("m{n}")).collect()
    }

    // CLOUD-2722
    #[test]
    fn a_report_with_more_than_its_bounds_is_refused_with_the_field_and_one_at_them_is_taken() {
        let empty = |count| (0..count).map(|n| pool(n, |_| {})).collect::<Vec<_>>();
        let of_models = |count: usize, each: usize| {
            beat((0..count).map(|n| pool(n, |pool| pool["models"] = json!(names(each)))).collect())
        };
        let replica = |n: usize, attempts: usize| json!({"replica_id":format!("r{n}"),"ready":true,"slots_total":1,"attempts":vec![Uuid::nil(); attempts]});
        let of_replicas = |count: usize, attempts: usize| {
            let replicas: Vec<_> = (0..count).map(|n| replica(n, attempts)).collect();
            beat(vec![pool(0, |pool| pool["replicas"] = json!(replicas))])
        };
        let staged = |count: usize| {
            let digest = format!("sha256:{}", "0".repeat(64));
            let model = |name: &String| json!({"model_id":name,"digest":digest,"bytes":1});
            let models: Vec<_> = names(count).iter().map(model).collect();
            serde_json::from_value::<Heartbeat>(json!({"epoch":"e","seq":1,"timestamp":"","models":models}))
                .unwrap()
        };
        let troubled = |count: usize| {
            let problem = |file: &String| json!({"kind":"handoff","file":file,"message":"no"});
            let problems: Vec<_> = names(count).iter().map(problem).collect();
            serde_json::from_value::<Heartbeat>(
                json!({"epoch":"e","seq":1,"timestamp":"","pools":[],"problems":problems}),
            )
            .unwrap()
        };
        let full = MAX_REPORT_MODELS / MAX_POOL_MODELS;
        let cases = [
            ("pools:", beat(empty(MAX_REPORT_POOLS)), beat(empty(MAX_REPORT_POOLS + 1))),
            ("pools.models", of_models(1, MAX_POOL_MODELS), of_models(1, MAX_POOL_MODELS + 1)),
            ("models of all pools", of_models(full, MAX_POOL_MODELS), of_models(full + 1, MAX_POOL_MODELS)),
            ("replicas", of_replicas(MAX_REPORT_REPLICAS, 1), of_replicas(MAX_REPORT_REPLICAS + 1, 1)),
            ("attempts", of_replicas(1, MAX_REPORT_ATTEMPTS), of_replicas(1, MAX_REPORT_ATTEMPTS + 1)),
            ("models:", staged(MAX_REPORT_MODELS), staged(MAX_REPORT_MODELS + 1)),
            ("problems:", troubled(MAX_PROBLEMS), troubled(MAX_PROBLEMS + 1)),
        ];
        for (field, good, bad) in cases {
            assert_eq!(good.check(), Ok(()), "{field}");
            let error = bad.check().unwrap_err();
            assert!(error.message.starts_with(field), "{field}: {}", error.message);
        }
        let labels = |count| {
            registration(|it| {
                it["labels"] = names(count).into_iter().map(|name| (name, json!("x"))).collect()
            })
        };
        assert_eq!(labels(MAX_LABELS).check(), Ok(()));
        assert!(labels(MAX_LABELS + 1).check().unwrap_err().message.starts_with("labels:"));
        let pools = registration(|it| it["pools"] = json!(names(MAX_REPORT_POOLS + 1)));
        assert!(pools.check().unwrap_err().message.starts_with("pools:"));
    }

    // CLOUD-2721
    // CLOUD-2722
    #[test]
    fn what_a_node_makes_of_engines_that_say_too_much_is_a_report_that_is_taken() {
        let lines = names(100).iter().map(|line| line.repeat(1_000)).collect::<Vec<_>>();
        let talkative = |n| {
            pool(n, |pool| {
                pool["models"] = json!(names(MAX_POOL_MODELS + 5));
                pool["last_error"] = json!("x".repeat(1_000_000));
                pool["supervised"] = json!({"log_tail": lines, "reload": {"error": "y".repeat(10_000)}});
            })
        };
        let mut made = beat((0..20).map(talkative).collect());
        made.cut_lists();
        made.cut_texts();
        assert_eq!(made.check(), Ok(()));
        assert_eq!(made.pools.iter().map(|pool| pool.models.len()).sum::<usize>(), MAX_REPORT_MODELS);
        let first = &made.pools[0];
        let supervised = first.supervised.as_ref().unwrap();
        assert_eq!(first.last_error.as_ref().unwrap().len(), MAX_MESSAGE_BYTES);
        assert!(supervised.log_tail.last().unwrap().starts_with("m99"), "the last lines are kept");
        assert!(supervised.log_tail.iter().all(|line| line.len() <= MAX_MESSAGE_BYTES));
        assert_eq!(supervised.reload.as_ref().unwrap().error.as_ref().unwrap().len(), MAX_MESSAGE_BYTES);
    }

    // CLOUD-1107
    #[test]
    fn the_documents_bounds_are_those_that_are_checked() {
        let bound = |schema: &Value, field: &str| {
            schema["properties"][field]["maxItems"].as_u64().map(|most| usize::try_from(most).unwrap())
        };
        let json =
            |schema| serde_json::to_value::<utoipa::openapi::RefOr<utoipa::openapi::Schema>>(schema).unwrap();
        let (beat, pool) = (json(Heartbeat::schema()), json(PoolReport::schema()));
        assert_eq!(bound(&beat, "pools"), Some(MAX_REPORT_POOLS));
        assert_eq!(bound(&beat, "gpus"), Some(MAX_GPUS));
        assert_eq!(bound(&beat, "models"), Some(MAX_REPORT_MODELS));
        assert_eq!(bound(&beat, "problems"), Some(MAX_PROBLEMS));
        assert_eq!(bound(&pool, "models"), Some(MAX_POOL_MODELS));
        assert_eq!(bound(&pool, "replicas"), Some(MAX_REPORT_REPLICAS));
        let request = json(RegisterRequest::schema());
        assert_eq!(bound(&request, "pools"), Some(MAX_REPORT_POOLS));
        assert_eq!(bound(&request, "features"), Some(MAX_LABELS));
    }
}
