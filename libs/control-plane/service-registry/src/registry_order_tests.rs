//! What is ordered and counted is what a walk over everything finds, whatever has happened.

use std::collections::btree_map::Entry;

use pool_registry_types::LabelName;

use super::*;

#[derive(Debug, Clone)]
enum Verb {
    Register(u8, u8, bool, u8, u8),
    Deregister(u8),
    Beat(u8, Vec<u8>, bool),
    Alive(u8),
    DialFailed(u8),
    Denied(u8),
    Probed(u8, u8),
    WantProbe(u8),
    TokensChanged,
    Want(u8, bool),
    WantStored(u8, bool),
    /// The order before the last one where it is an old one.
    IntentTaken(u8, bool),
    Reserve(u8, u8),
    Accepted(u8),
    Release(u8, bool),
    Hold(u8),
    PoolFailed(u8, u8),
    StreamFailed(u8, u8),
    Proven(u8),
    Stalled(u16),
    Tick(u16),
    TakeProbes,
}

fn verbs() -> impl Strategy<Value = Vec<Verb>> {
    let node = 0_u8..6;
    let verb = prop_oneof![
        3 => (node.clone(), 0_u8..2, any::<bool>(), 0_u8..3, 0_u8..3)
            .prop_map(|(n, b, a, labels, by)| Verb::Register(n, b, a, labels, by)),
        1 => node.clone().prop_map(Verb::Deregister),
        6 => (node.clone(), prop::collection::vec(0_u8..12, 0..4), any::<bool>())
            .prop_map(|(n, listed, tokens)| Verb::Beat(n, listed, tokens)),
        2 => node.clone().prop_map(Verb::Alive),
        1 => node.clone().prop_map(Verb::DialFailed),
        1 => node.clone().prop_map(Verb::Denied),
        4 => (node.clone(), 0_u8..4).prop_map(|(n, how)| Verb::Probed(n, how)),
        1 => node.clone().prop_map(Verb::WantProbe),
        1 => Just(Verb::TokensChanged),
        2 => (node.clone(), any::<bool>()).prop_map(|(n, drains)| Verb::Want(n, drains)),
        1 => (node.clone(), any::<bool>()).prop_map(|(n, drains)| Verb::WantStored(n, drains)),
        2 => (node.clone(), any::<bool>()).prop_map(|(n, old)| Verb::IntentTaken(n, old)),
        3 => (node.clone(), 0_u8..12).prop_map(|(n, k)| Verb::Reserve(n, k)),
        1 => (0_u8..12).prop_map(Verb::Accepted),
        2 => (0_u8..12, any::<bool>()).prop_map(|(k, closed)| Verb::Release(k, closed)),
        1 => node.clone().prop_map(Verb::Hold),
        3 => (node.clone(), 0_u8..12).prop_map(|(n, k)| Verb::PoolFailed(n, k)),
        3 => (node.clone(), 0_u8..12).prop_map(|(n, k)| Verb::StreamFailed(n, k)),
        1 => node.prop_map(Verb::Proven),
        1 => (0_u16..3_000).prop_map(Verb::Stalled),
        8 => (0_u16..3_000).prop_map(Verb::Tick),
        3 => Just(Verb::TakeProbes),
    ];
    prop::collection::vec(verb, 1..120)
}

/// A registry of at most four nodes, and what the verbs need to know of it.
struct Driven {
    registry: ServiceRegistry,
    now: u64,
    seq: u64,
    epochs: BTreeMap<String, Epoch>,
    /// The nodes of the attempts that have a claim.
    reserved: BTreeMap<u8, u8>,
    /// The last two orders for each node.
    orders: BTreeMap<String, [Option<IntentOrder>; 2]>,
}

/// Those of a node that is placed so, or has none.
fn labels(which: u8) -> Labels {
    let label = |text: &str| LabelName::new(text).unwrap();
    let zone = [None, Some("east"), Some("west")][usize::from(which)];
    zone.map(|zone| (label("zone"), label(zone))).into_iter().collect()
}

impl Driven {
    fn apply(&mut self, verb: Verb) {
        let (r, now, name) = (&mut self.registry, at(self.now), |n: u8| format!("n{n}"));
        let id = |n: u8| node_id(&name(n));
        let address = |n: u8| format!("http://n{n}");
        match verb {
            Verb::Register(n, boot, elsewhere, which, by) => {
                let address = if elsewhere { "http://elsewhere".to_owned() } else { address(n) };
                let request = request(&name(n), boot.into(), &address);
                let request = RegisterRequest { labels: labels(which), ..request };
                let by = (by > 0).then(|| registrar(&format!("token {by}"), usize::from(by)));
                if let Ok(registered) = r.register(now, request, by.as_ref()) {
                    self.epochs.insert(name(n), registered.epoch);
                }
            }
            Verb::Deregister(n) => drop(r.deregister(&id(n), None)),
            Verb::Beat(n, listed, tokens) => {
                self.seq += 1;
                let listed: Vec<AttemptId> = listed.into_iter().map(|k| attempt(k.into())).collect();
                if let Some(epoch) = self.epochs.get(&name(n)) {
                    let tokens_changed = u64::from(tokens);
                    let beat = Heartbeat { tokens_changed, ..beat(epoch, self.seq, &listed) };
                    drop(r.heartbeat(now, &id(n), beat));
                }
            }
            Verb::Alive(n) => r.alive(now, &id(n)),
            Verb::DialFailed(n) => drop(r.dial_failed(now, &id(n), "refused".into())),
            Verb::Denied(n) => drop(r.denied(now, &id(n), now, "401".into())),
            Verb::Probed(n, how) => {
                let outcome = match how {
                    0 => ProbeOutcome::Failed("refused".into()),
                    1 => ProbeOutcome::Inconclusive,
                    2 => live(&name(n), 0),
                    _ => live(&name(n), 1),
                };
                drop(r.probed(now, &id(n), &address(n), outcome));
            }
            Verb::WantProbe(n) => r.want_probe(now, &id(n)),
            Verb::TokensChanged => r.tokens_changed(now),
            Verb::Want(n, drains) => {
                let intent = if drains { Intent::Draining } else { Intent::Serving };
                if let Some((_, order)) = r.want(&id(n), intent) {
                    let orders = self.orders.entry(name(n)).or_default();
                    *orders = [orders[1].take(), Some(order)];
                }
            }
            Verb::WantStored(n, drains) => {
                let intent = if drains { Intent::Draining } else { Intent::Serving };
                let is_known = r.view(now).nodes.iter().any(|node| node.node_id == id(n));
                // The core asks so only for a node that is gone.
                if !is_known {
                    r.want_stored(&id(n), intent);
                }
            }
            Verb::IntentTaken(n, old) => {
                let orders = self.orders.get(&name(n)).cloned().unwrap_or_default();
                if let Some(order) = &orders[usize::from(!old)] {
                    r.intent_taken(&id(n), order);
                }
            }
            Verb::Reserve(n, k) => {
                if let Entry::Vacant(free) = self.reserved.entry(k) {
                    free.insert(n);
                    r.reserve(&pool(&name(n)), attempt(k.into()));
                }
            }
            Verb::Accepted(k) => {
                let n = self.reserved.get(&k).copied().unwrap_or_default();
                r.accepted(&pool(&name(n)), &attempt(k.into()), self.seq);
            }
            Verb::Release(k, closed) => {
                let n = self.reserved.remove(&k);
                let at = pool(&name(n.unwrap_or_default()));
                let released = r.release(&at, &attempt(k.into()), closed.then_some(self.seq));
                assert_eq!(released, n.is_some(), "a claim outlives its node");
            }
            Verb::Hold(n) => r.hold(&pool(&name(n)), now + Duration::from_millis(250)),
            Verb::PoolFailed(n, k) => {
                let task = TaskId(Uuid::from_u128(k.into()));
                r.pool_failed(now, &pool(&name(n)), &attempt(k.into()), task, now);
                r.pool_absolved(&pool(&name(n)), TaskId(Uuid::from_u128(u128::from(k) + 1)));
            }
            Verb::StreamFailed(n, k) => drop(r.stream_failed(now, &id(n), &attempt(k.into()), now)),
            Verb::Proven(n) => drop(r.proven(&pool(&name(n)))),
            Verb::Stalled(millis) => r.stalled(now, Duration::from_millis(millis.into())),
            Verb::Tick(millis) => {
                self.now += u64::from(millis);
                drop(r.expire(at(self.now)));
            }
            Verb::TakeProbes => drop(r.take_due_probes(now)),
        }
    }
}

proptest! {
    // CLOUD-1774
    #[test]
    fn what_is_ordered_and_counted_is_what_a_walk_finds_after_any_verbs(verbs in verbs()) {
        let registry = registry_of(1, None);
        let registry = ServiceRegistry { settings: Settings { max_nodes: 4, ..registry.settings }, ..registry };
        let mut driven =
            Driven {
                registry,
                now: 0,
                seq: 0,
                epochs: BTreeMap::new(),
                reserved: BTreeMap::new(),
                orders: BTreeMap::new(),
            };
        for (n, verb) in verbs.into_iter().enumerate() {
            driven.apply(verb.clone());
            let (now, r) = (at(driven.now), &mut driven.registry);
            prop_assert_eq!(r.check_order(), Ok(()), "after {:?}", verb);
            prop_assert_eq!(r.reservation_count(), driven.reserved.len(), "after {:?}", verb);
            if n % 3 == 0 {
                // CLOUD-1775
                prop_assert_eq!(r.snapshot(now).view(), r.view(now), "after {:?}", verb);
            }
            drop(r.expire(now));
            // The first may have ended the guard of mass silence, by which more is due.
            drop(r.expire(now));
            drop(r.take_due_probes(now));
            prop_assert!(r.next_deadline().is_none_or(|next| next > now), "what is due is done");
        }
    }
}
