//! Which connections there is room for.
//!
//! A connection is a stranger's until a request on it was let in: then whoever holds it has shown a
//! token, or needs none here. Strangers have three quarters of the room, and where that is full, or all
//! of it, one of them is closed for the next: of the host that has most of them the one that came first.
//! So none who only connects keeps others out, however many they are, and it does not matter that all
//! who come through a proxy have its address.
//!
//! Those that were let in make room only where no stranger can, and only if they stand still: their peers
//! take nothing of an answer. And no holder without the scope `admin` has more than half of the room.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use pool_registry_types::HolderId;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::activity::Activity;

/// Whose peer has taken nothing of an answer for so long makes room: longer than a network that works
/// stands still. Source: .specs/01 CLOUD-2766.
const STANDS_STILL: Duration = Duration::from_secs(5);
/// Pause between two looks at all connections for one that stands still, where none did.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Connections that stand still, at most: each holds up to 64 KiB. Source: .specs/01 CLOUD-2766.
const MOST_STILL: usize = 1024;

/// The room for connections.
#[derive(Debug)]
pub(crate) struct Room {
    most: usize,
    strangers: usize,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    /// Connections that ever came.
    came: u64,
    let_in: BTreeMap<u64, Arc<ConnectionEntry>>,
    /// Of those that were let in how many each holder has that may not have them all.
    of_holders: HashMap<HolderId, usize>,
    /// When none of them stood still.
    none_stood: Option<Instant>,
    strangers: usize,
    /// Strangers by their hosts, in the order in which they came.
    hosts: HashMap<IpAddr, BTreeMap<u64, CancellationToken>>,
    /// How many each host has.
    by_number: BTreeSet<(usize, IpAddr)>,
}

impl Open {
    fn add(&mut self, host: IpAddr, number: u64, closed: CancellationToken) {
        self.strangers += 1;
        let own = self.hosts.entry(host).or_default();
        self.by_number.remove(&(own.len(), host));
        own.insert(number, closed);
        self.by_number.insert((own.len(), host));
    }

    /// Takes a stranger out; nothing where it is none any more.
    fn remove(&mut self, host: IpAddr, number: u64) -> Option<CancellationToken> {
        let own = self.hosts.get_mut(&host)?;
        let closed = own.remove(&number)?;
        self.strangers -= 1;
        self.by_number.remove(&(own.len() + 1, host));
        if own.is_empty() {
            self.hosts.remove(&host);
        } else {
            self.by_number.insert((own.len(), host));
        }
        Some(closed)
    }

    /// Closes the stranger that others bear with longest.
    fn close_one(&mut self) -> bool {
        let Some((_, host)) = self.by_number.last().copied() else { return false };
        let first = self.hosts.get(&host).and_then(|own| own.first_key_value()).map(|(number, _)| *number);
        let Some(closed) = first.and_then(|number| self.remove(host, number)) else { return false };
        closed.cancel();
        true
    }

    /// Takes one out that was let in; nothing where it is none any more.
    fn remove_let_in(&mut self, number: u64) -> Option<Arc<ConnectionEntry>> {
        let entry = self.let_in.remove(&number)?;
        if let Some(holder) = entry.holder.get()
            && let Some(own) = self.of_holders.get_mut(holder)
        {
            *own -= 1;
            if *own == 0 {
                self.of_holders.remove(holder);
            }
        }
        Some(entry)
    }

    /// Closes the one that was let in and has stood still for longest.
    fn close_still(&mut self, now: Instant) -> bool {
        if self.none_stood.is_some_and(|looked| now < looked + LOOK_EVERY) {
            return false;
        }
        let stands = |entry: &Arc<ConnectionEntry>| Some((entry.stands_still_since()?, entry.number));
        let longest = self.let_in.values().filter_map(stands).min();
        let Some((_, number)) = longest.filter(|(since, _)| *since + STANDS_STILL <= now) else {
            self.none_stood = Some(now);
            return false;
        };
        self.close_let_in(number)
    }

    fn close_let_in(&mut self, number: u64) -> bool {
        let Some(entry) = self.remove_let_in(number) else { return false };
        entry.makes_room.store(true, Ordering::Relaxed);
        entry.closed.cancel();
        true
    }

    /// Of those that stand still too many, who have for longest.
    fn too_many_still(&self, now: Instant, most: usize) -> Vec<u64> {
        if self.let_in.len() <= most {
            return Vec::new();
        }
        let stands = |entry: &Arc<ConnectionEntry>| Some((entry.stands_still_since()?, entry.number));
        let mut still: Vec<_> = self.let_in.values().filter_map(stands).collect();
        still.retain(|(since, _)| *since + STANDS_STILL <= now);
        still.sort_unstable();
        still.truncate(still.len().saturating_sub(most));
        still.into_iter().map(|(_, number)| number).collect()
    }
}

/// A connection has come: whether it finds room.
#[derive(Debug)]
pub(crate) enum Found {
    /// It does, and nobody is closed for it.
    Free(ConnectionPermit),
    /// A stranger is closed for it.
    InPlaceOf(ConnectionPermit),
    /// One is closed for it that was let in and stood still.
    InPlaceOfStill(ConnectionPermit),
    /// All of the room is taken by those that were let in.
    Full,
}

impl Room {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        let strangers = most - most / 4;
        Arc::new(Self { most, strangers, open: Mutex::default() })
    }

    /// Closes those that stand still too many. Returns how many.
    pub(crate) fn close_too_many_still(&self) -> usize {
        self.close_still_beyond(MOST_STILL)
    }

    fn close_still_beyond(&self, most: usize) -> usize {
        let mut open = self.open.lock();
        let closed = open.too_many_still(Instant::now(), most);
        closed.into_iter().filter(|number| open.close_let_in(*number)).count()
    }

    /// How many connections one holder may have that may not have all.
    fn most_of_holder(&self) -> usize {
        self.most.div_ceil(2)
    }

    pub(crate) fn find(self: &Arc<Self>, host: IpAddr) -> Found {
        let host = neighbourhood(host);
        let mut open = self.open.lock();
        let is_full = open.let_in.len() + open.strangers >= self.most || open.strangers >= self.strangers;
        let found = if !is_full {
            Found::Free
        } else if open.close_one() {
            Found::InPlaceOf
        } else if open.close_still(Instant::now()) {
            Found::InPlaceOfStill
        } else {
            return Found::Full;
        };
        open.came += 1;
        let (number, closed) = (open.came, CancellationToken::new());
        open.add(host, number, closed.clone());
        found(ConnectionPermit(Arc::new(ConnectionEntry {
            room: Arc::clone(self),
            host,
            number,
            closed,
            was_let_in: AtomicBool::new(false),
            makes_room: AtomicBool::new(false),
            holder: OnceLock::new(),
            activity: OnceLock::new(),
        })))
    }
}

/// Whom an address may well share its holder with: of IPv6 a host has a whole /64.
fn neighbourhood(host: IpAddr) -> IpAddr {
    match host.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from(u128::from(ip) >> 64 << 64).into(),
        ip @ IpAddr::V4(_) => ip,
    }
}

/// The place of one connection, until it is dropped.
#[derive(Debug)]
pub(crate) struct ConnectionPermit(Arc<ConnectionEntry>);

impl ConnectionPermit {
    pub(crate) fn entry(&self) -> &Arc<ConnectionEntry> {
        &self.0
    }

    /// Resolves when the connection is to make room.
    pub(crate) async fn closed(&self) {
        self.0.closed.cancelled().await;
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let entry = &*self.0;
        let mut open = entry.room.open.lock();
        let gone = (open.remove(entry.host, entry.number), open.remove_let_in(entry.number));
        drop(open);
        drop(gone);
    }
}

/// How a connection stands. In the extensions of each of its requests, as `Arc<ConnectionEntry>`.
#[derive(Debug)]
pub(crate) struct ConnectionEntry {
    room: Arc<Room>,
    host: IpAddr,
    number: u64,
    closed: CancellationToken,
    /// Changed under the room's lock only.
    was_let_in: AtomicBool,
    /// It is being closed though it was let in.
    makes_room: AtomicBool,
    /// Whose it is, where that one may not have all of the room.
    holder: OnceLock<HolderId>,
    /// Of the connection, once it is served.
    activity: OnceLock<Arc<Activity>>,
}

/// The holder of a token has as many connections as it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the holder of this token has {0} connections already, which is the most")]
pub(crate) struct TooMany(usize);

impl ConnectionEntry {
    /// No request on it was let in so far.
    pub(crate) fn is_strangers(&self) -> bool {
        !self.was_let_in.load(Ordering::Relaxed)
    }

    /// It is being closed for another one.
    pub(crate) fn makes_room(&self) -> bool {
        self.is_strangers() || self.makes_room.load(Ordering::Relaxed)
    }

    /// What it does, from now on.
    pub(crate) fn serves(&self, activity: &Arc<Activity>) {
        let _ = self.activity.set(Arc::clone(activity));
    }

    fn stands_still_since(&self) -> Option<Instant> {
        self.activity.get()?.stopped()
    }

    /// A request on it was let in: one of this holder's, where it may not have all of the room.
    ///
    /// # Errors
    /// [`TooMany`]; it stays a stranger's then.
    pub(crate) fn let_in(self: &Arc<Self>, bounded: Option<HolderId>) -> Result<(), TooMany> {
        if !self.is_strangers() {
            return Ok(());
        }
        let mut open = self.room.open.lock();
        let most = self.room.most_of_holder();
        if bounded.is_some_and(|holder| open.of_holders.get(&holder).is_some_and(|own| *own >= most)) {
            return Err(TooMany(most));
        }
        // One that is being closed stays what it was, and so does one that has gone.
        if open.remove(self.host, self.number).is_some() {
            if let Some(holder) = bounded {
                *open.of_holders.entry(holder).or_default() += 1;
                let _ = self.holder.set(holder);
            }
            open.let_in.insert(self.number, Arc::clone(self));
            self.was_let_in.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(found: Found) -> ConnectionPermit {
        match found {
            Found::Free(place) | Found::InPlaceOf(place) | Found::InPlaceOfStill(place) => place,
            Found::Full => panic!("there is no room"),
        }
    }

    fn is_closed(place: &ConnectionPermit) -> bool {
        place.0.closed.is_cancelled()
    }

    // CLOUD-2760
    // CLOUD-2761
    #[test]
    fn strangers_make_room_the_first_of_the_host_with_most_and_those_let_in_that_read_never() {
        let room = Room::new(8);
        let (one, other, third): (IpAddr, IpAddr, IpAddr) =
            ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap(), "10.0.0.3".parse().unwrap());
        let known = place(room.find(one));
        known.entry().let_in(None).unwrap();
        let single = place(room.find(third));
        let mut strangers: Vec<ConnectionPermit> = (0..2).map(|_| place(room.find(other))).collect();
        strangers.extend((0..3).map(|_| place(room.find(one))));
        // Six strangers are three quarters.
        let next = room.find(third);
        assert!(matches!(next, Found::InPlaceOf(_)));
        assert_eq!(strangers.iter().map(is_closed).collect::<Vec<_>>(), [false, false, true, false, false]);
        let next = place(next);
        next.entry().let_in(None).unwrap();
        // Half of the room is another's by now, and so on: none that was let in has gone.
        let more: Vec<ConnectionPermit> = (0..6)
            .map(|_| {
                let place = place(room.find(one));
                place.entry().let_in(None).unwrap();
                place
            })
            .collect();
        assert!(strangers.iter().all(is_closed) && is_closed(&single));
        assert!(![&known, &next].into_iter().chain(&more).any(is_closed));
        assert!(matches!(room.find(other), Found::Full));
        drop(more);
        drop((strangers, single));
        assert!(matches!(room.find(other), Found::Free(_)));
        let open = room.open.lock();
        assert_eq!((open.let_in.len(), open.strangers, open.hosts.len(), open.by_number.len()), (2, 0, 0, 0));
    }

    // CLOUD-2760
    #[test]
    fn what_is_let_in_while_it_is_closed_takes_no_place() {
        let room = Room::new(1);
        let host = "::1".parse().unwrap();
        let first = place(room.find(host));
        let second = place(room.find(host));
        first.entry().let_in(None).unwrap();
        assert!(is_closed(&first));
        second.entry().let_in(None).unwrap();
        assert!(matches!(room.find(host), Found::Full));
        drop(first);
        assert!(matches!(room.find(host), Found::Full));
        drop(second);
        assert!(matches!(room.find(host), Found::Free(_)));
    }

    // CLOUD-2766
    #[tokio::test(start_paused = true)]
    async fn where_all_were_let_in_the_one_that_stood_still_for_longest_makes_room() {
        let room = Room::new(3);
        let host = "10.0.0.1".parse().unwrap();
        let taken: Vec<_> = (0..3)
            .map(|_| {
                let (place, second) = (place(room.find(host)), Duration::from_secs(1));
                let activity = Arc::new(Activity::new(tokio::time::Instant::now(), second, second, second));
                place.entry().serves(&activity);
                place.entry().let_in(None).unwrap();
                (place, activity)
            })
            .collect();
        assert!(matches!(room.find(host), Found::Full), "all of them read");
        taken[1].1.write_waits(true);
        tokio::time::advance(Duration::from_secs(1)).await;
        taken[0].1.write_waits(true);
        assert!(matches!(room.find(host), Found::Full), "none stands still for long");
        tokio::time::advance(STANDS_STILL - Duration::from_secs(1)).await;
        let next = room.find(host);
        assert!(matches!(next, Found::InPlaceOfStill(_)));
        assert_eq!(taken.iter().map(|(place, _)| is_closed(place)).collect::<Vec<_>>(), [false, true, false]);
        assert!(taken[1].0.entry().makes_room() && !taken[0].0.entry().makes_room());
        let next = place(next);
        next.entry().let_in(None).unwrap();
        assert!(matches!(room.find(host), Found::Full), "the other one does not stand for long enough");
        // Also where there is room, if they are too many.
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!((room.close_still_beyond(1), room.close_still_beyond(0)), (0, 1));
        assert!(is_closed(&taken[0].0));
        taken[2].1.write_waits(true);
        next.entry().serves(&taken[2].1);
        // Whoever reads on is not closed.
        taken[2].1.write_waits(false);
        tokio::time::advance(STANDS_STILL).await;
        assert_eq!(room.close_still_beyond(0), 0);
        drop((taken, next));
        let open = room.open.lock();
        assert_eq!((open.let_in.len(), open.strangers), (0, 0));
    }

    // CLOUD-2767
    #[test]
    fn one_holder_has_half_of_the_room_and_whoever_may_do_everything_all_of_it() {
        let room = Room::new(5);
        let host = "10.0.0.1".parse().unwrap();
        let [one, other] = [1, 2].map(|n| Some(HolderId(uuid::Uuid::from_u128(n))));
        let own: Vec<_> = (0..3)
            .map(|_| {
                let place = place(room.find(host));
                place.entry().let_in(one).unwrap();
                place
            })
            .collect();
        let next = place(room.find(host));
        assert_eq!(next.entry().let_in(one), Err(TooMany(3)));
        assert!(next.entry().is_strangers());
        assert_eq!(own[0].entry().let_in(one), Ok(()), "the next request of one that was let in");
        next.entry().let_in(other).unwrap();
        place(room.find(host)).entry().let_in(None).unwrap();
        drop(own);
        place(room.find(host)).entry().let_in(one).unwrap();
        drop(next);
        assert!(room.open.lock().of_holders.is_empty());
    }

    #[test]
    fn a_host_has_a_whole_network_of_ipv6() {
        let of = |ip: &str| neighbourhood(ip.parse().unwrap()).to_string();
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(of("::ffff:10.0.0.1"), "10.0.0.1");
    }
}
