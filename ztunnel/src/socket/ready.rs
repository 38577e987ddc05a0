//! Sockets that were made in advance.
//!
//! A socket belongs to the netns in which it was made, and entering one and leaving it again costs
//! more than the socket. So who dials often makes some more on each visit.

use std::{
    cell::RefCell,
    collections::HashMap,
    io,
    time::{Duration, Instant},
};

use adit_netns::{Netns, NetnsId};
use socket2::Socket;

/// Who comes again within this time dials often.
const OFTEN: Duration = Duration::from_millis(10);

/// How many more are made on a visit. With more the visit itself would delay a connection.
const SPARE: usize = 3;

/// How many may wait, of all pods: they are in nobody's budget.
const MOST: usize = 48;

/// What sockets have in common that stand for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Kind {
    pub netns: NetnsId,
    pub is_ipv4: bool,
    pub mark: u32,
    /// May use addresses of others.
    pub is_transparent: bool,
}

#[derive(Debug, Default)]
struct Shelf {
    sockets: Vec<Socket>,
    visited: Option<Instant>,
}

/// The sockets of one worker that wait to be used.
#[derive(Debug, Default)]
pub(crate) struct ReadySockets(RefCell<HashMap<Kind, Shelf>>);

impl ReadySockets {
    /// A socket of `kind`, as `make` makes it inside `netns`.
    pub(super) fn take(
        &self,
        netns: &Netns,
        kind: Kind,
        make: impl Fn() -> io::Result<Socket>,
    ) -> io::Result<Socket> {
        let now = Instant::now();
        let last = {
            let mut all = self.0.borrow_mut();
            let waiting = all.entry(kind).or_default();
            if let Some(socket) = waiting.sockets.pop() {
                return Ok(socket);
            }
            waiting.visited.replace(now)
        };
        let spare = if last.is_some_and(|last| now.duration_since(last) < OFTEN) { SPARE } else { 0 };
        let (socket, more) = netns.enter(|| {
            let socket = make()?;
            let more: Vec<Socket> = (0..spare).map_while(|_| make().ok()).collect();
            Ok((socket, more))
        })?;
        if !more.is_empty() {
            self.keep(kind, more);
        }
        Ok(socket)
    }

    fn keep(&self, kind: Kind, more: Vec<Socket>) {
        let mut shelves = self.0.borrow_mut();
        if shelves.values().map(|shelf| shelf.sockets.len()).sum::<usize>() + more.len() > MOST {
            // Whoever dials often now makes new ones.
            shelves.values_mut().for_each(|shelf| shelf.sockets.clear());
        }
        shelves.entry(kind).or_default().sockets = more;
    }

    /// Closes those in a netns that is served no longer.
    pub(crate) fn forget(&self, netns: NetnsId) {
        self.0.borrow_mut().retain(|kind, _| kind.netns != netns);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use socket2::{Domain, Type};
    use testbed::netns::TestNetns;

    use super::*;

    fn kind(netns: &Netns) -> Kind {
        Kind { netns: netns.id(), is_ipv4: true, mark: 0, is_transparent: false }
    }

    #[test]
    #[ignore = "needs root: make test"]
    fn who_dials_often_enters_its_netns_less_often_and_others_leave_nothing() {
        let name = format!("zt{}ready", std::process::id());
        let pod = TestNetns::new(&name);
        pod.run("ip addr add 192.0.2.1/32 dev lo");
        let netns = Netns::new(pod.open()).unwrap();
        let (ready, count) = (ReadySockets::default(), Cell::new(0));
        let make = || {
            count.set(count.get() + 1);
            Socket::new(Domain::IPV4, Type::STREAM, None)
        };
        let take = || {
            let socket = ready.take(&netns, kind(&netns), make).unwrap();
            // Only there can it be bound to that.
            socket.bind(&"192.0.2.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
        };
        take();
        assert_eq!(count.get(), 1);
        (0..=SPARE).for_each(|_| take());
        assert_eq!(count.get(), SPARE + 2);
        take();
        assert_eq!(count.get(), 2 * SPARE + 3);
        ready.0.borrow_mut().get_mut(&kind(&netns)).unwrap().visited = Instant::now().checked_sub(2 * OFTEN);
        (0..=SPARE).for_each(|_| take());
        assert_eq!(count.get(), 2 * SPARE + 4, "it has not dialled for a while");
        take();
        ready.forget(netns.id());
        assert!(ready.0.borrow().is_empty());
    }

    #[test]
    fn only_so_many_wait() {
        let netns = Netns::current().unwrap();
        let ready = ReadySockets::default();
        let waiting = || ready.0.borrow().values().map(|shelf| shelf.sockets.len()).sum::<usize>();
        for mark in 0..100 {
            let kind = Kind { mark, ..kind(&netns) };
            let more = (0..SPARE).map(|_| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
            ready.keep(kind, more.collect());
            assert!(waiting() <= MOST && waiting() >= SPARE);
        }
    }
}
