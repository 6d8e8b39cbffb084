//! Which connections there is room for.
//!
//! A connection is a stranger's until a request on it was let in: then whoever holds it has shown a
//! token, or needs none here. Strangers have three quarters of the room, and where that is full, or all
//! of it, one of them is closed for the next: of the host that has most of them the one that came first.
//! So none who only connects keeps others out, however many they are, and it does not matter that all
//! who come through a proxy have its address. Those that were let in are never closed for others.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

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
    let_in: usize,
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
}

/// A connection has come: whether it finds room.
#[derive(Debug)]
pub(crate) enum Found {
    /// It does, and nobody is closed for it.
    Free(ConnectionPermit),
    /// A stranger is closed for it.
    InPlaceOf(ConnectionPermit),
    /// All of the room is taken by those that were let in.
    Full,
}

impl Room {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        let strangers = most - most / 4;
        Arc::new(Self { most, strangers, open: Mutex::default() })
    }

    pub(crate) fn find(self: &Arc<Self>, host: IpAddr) -> Found {
        let host = neighbourhood(host);
        let mut open = self.open.lock();
        let is_full =
            |open: &Open| open.let_in + open.strangers >= self.most || open.strangers >= self.strangers;
        let is_free = !is_full(&open);
        if !is_free && !open.close_one() {
            return Found::Full;
        }
        open.came += 1;
        let (number, closed) = (open.came, CancellationToken::new());
        open.add(host, number, closed.clone());
        let entry = ConnectionEntry {
            room: Arc::clone(self),
            host,
            number,
            closed,
            was_let_in: AtomicBool::new(false),
        };
        let place = ConnectionPermit(Arc::new(entry));
        if is_free { Found::Free(place) } else { Found::InPlaceOf(place) }
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
        if open.remove(entry.host, entry.number).is_none() && !entry.is_strangers() {
            open.let_in -= 1;
        }
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
}

impl ConnectionEntry {
    /// No request on it was let in so far.
    pub(crate) fn is_strangers(&self) -> bool {
        !self.was_let_in.load(Ordering::Relaxed)
    }

    /// A request on it was let in.
    pub(crate) fn let_in(&self) {
        if !self.is_strangers() {
            return;
        }
        let mut open = self.room.open.lock();
        // One that is being closed stays what it was, and so does one that has gone.
        if open.remove(self.host, self.number).is_some() {
            open.let_in += 1;
            self.was_let_in.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(found: Found) -> ConnectionPermit {
        match found {
            Found::Free(place) | Found::InPlaceOf(place) => place,
            Found::Full => panic!("there is no room"),
        }
    }

    fn is_closed(place: &ConnectionPermit) -> bool {
        place.0.closed.is_cancelled()
    }

    // CLOUD-2760
    // CLOUD-2761
    #[test]
    fn strangers_make_room_the_first_of_the_host_with_most_and_those_let_in_never() {
        let room = Room::new(8);
        let (one, other, third): (IpAddr, IpAddr, IpAddr) =
            ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap(), "10.0.0.3".parse().unwrap());
        let known = place(room.find(one));
        known.entry().let_in();
        let single = place(room.find(third));
        let mut strangers: Vec<ConnectionPermit> = (0..2).map(|_| place(room.find(other))).collect();
        strangers.extend((0..3).map(|_| place(room.find(one))));
        // Six strangers are three quarters.
        let next = room.find(third);
        assert!(matches!(next, Found::InPlaceOf(_)));
        assert_eq!(strangers.iter().map(is_closed).collect::<Vec<_>>(), [false, false, true, false, false]);
        let next = place(next);
        next.entry().let_in();
        // Half of the room is another's by now, and so on: none that was let in has gone.
        let more: Vec<ConnectionPermit> = (0..6)
            .map(|_| {
                let place = place(room.find(one));
                place.entry().let_in();
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
        assert_eq!((open.let_in, open.strangers, open.hosts.len(), open.by_number.len()), (2, 0, 0, 0));
    }

    // CLOUD-2760
    #[test]
    fn what_is_let_in_while_it_is_closed_takes_no_place() {
        let room = Room::new(1);
        let host = "::1".parse().unwrap();
        let first = place(room.find(host));
        let second = place(room.find(host));
        first.entry().let_in();
        assert!(is_closed(&first));
        second.entry().let_in();
        assert!(matches!(room.find(host), Found::Full));
        drop(first);
        assert!(matches!(room.find(host), Found::Full));
        drop(second);
        assert!(matches!(room.find(host), Found::Free(_)));
    }

    #[test]
    fn a_host_has_a_whole_network_of_ipv6() {
        let of = |ip: &str| neighbourhood(ip.parse().unwrap()).to_string();
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(of("::ffff:10.0.0.1"), "10.0.0.1");
    }
}
