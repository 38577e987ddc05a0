//! Places for work that others cause, such as handshakes.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Semaphore, SemaphorePermit};

/// A limited number of places. Half of them go to whoever comes first, without bookkeeping. Of the
/// others one client gets at most a quarter, so that it alone cannot keep the rest out. Who finds
/// none waits, and clients do not wait behind each other; but only so many wait.
#[derive(Debug)]
pub(crate) struct Places {
    first: Semaphore,
    shared: Semaphore,
    /// Places of one client among the shared ones.
    share: usize,
    line: Mutex<Line>,
    /// How many may be in the line, of one client and of all.
    longest: [usize; 2],
}

/// Those that wait for a shared place or have one.
#[derive(Debug, Default)]
struct Line {
    all: usize,
    clients: HashMap<IpAddr, Client>,
}

#[derive(Debug)]
struct Client {
    count: usize,
    places: Arc<Semaphore>,
}

/// There is no place, and no room to wait for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoPlace;

/// A place, given back on drop.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    _permit: SemaphorePermit<'a>,
    _in_line: Option<InLine<'a>>,
}

impl Places {
    pub(super) fn new(count: usize) -> Self {
        let shared = count.div_ceil(2);
        Self {
            first: Semaphore::new(count - shared),
            shared: Semaphore::new(shared),
            share: shared.div_ceil(4),
            line: Mutex::default(),
            longest: [count.saturating_mul(2), count.saturating_mul(4)],
        }
    }

    /// A place for `client`, when there is one. Dropping the future leaves the line.
    pub(crate) async fn take(&self, client: IpAddr) -> Result<Place<'_>, NoPlace> {
        if let Ok(permit) = self.first.try_acquire() {
            return Ok(Place { _permit: permit, _in_line: None });
        }
        let (mut in_line, own) = self.join_line(client)?;
        in_line.permit = own.acquire_owned().await.ok();
        // Never closed.
        let permit = self.shared.acquire().await.map_err(|_| NoPlace)?;
        Ok(Place { _permit: permit, _in_line: Some(in_line) })
    }

    fn join_line(&self, client: IpAddr) -> Result<(InLine<'_>, Arc<Semaphore>), NoPlace> {
        let mut line = self.lock();
        if line.all >= self.longest[1] {
            return Err(NoPlace);
        }
        let places = match line.clients.entry(client) {
            Entry::Occupied(known) if known.get().count >= self.longest[0] => return Err(NoPlace),
            Entry::Occupied(mut known) => {
                known.get_mut().count += 1;
                Arc::clone(&known.get().places)
            }
            Entry::Vacant(new) => {
                let places = Arc::new(Semaphore::new(self.share));
                Arc::clone(&new.insert(Client { count: 1, places }).places)
            }
        };
        line.all += 1;
        Ok((InLine { places: self, client, permit: None }, places))
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct InLine<'a> {
    places: &'a Places,
    client: IpAddr,
    permit: Option<tokio::sync::OwnedSemaphorePermit>,
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        drop(self.permit.take());
        let mut line = self.places.lock();
        line.all -= 1;
        if let Entry::Occupied(mut client) = line.clients.entry(self.client) {
            client.get_mut().count -= 1;
            if client.get().count == 0 {
                client.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[tokio::test]
    async fn one_client_leaves_places_for_the_others() {
        let places = Places::new(16);
        let mut greedy = Vec::new();
        while let Some(place) = places.take(ip(1)).now_or_never() {
            greedy.push(place.unwrap());
        }
        assert_eq!(greedy.len(), 8 + 2);
        for last in 2..5 {
            for n in 0..2 {
                let place = places.take(ip(last)).now_or_never();
                greedy.push(place.unwrap_or_else(|| panic!("no place {n} for client {last}")).unwrap());
            }
        }
        assert!(places.take(ip(9)).now_or_never().is_none(), "all are taken");
    }

    #[tokio::test]
    async fn who_waits_is_next_and_who_leaves_the_line_is_forgotten() {
        let places = Places::new(2);
        let (first, shared) = (places.take(ip(1)).await.unwrap(), places.take(ip(1)).await.unwrap());
        let mut waiting = Box::pin(places.take(ip(1)));
        assert!(waiting.as_mut().now_or_never().is_none());
        assert!(places.take(ip(1)).now_or_never().is_none(), "and left again");
        drop(shared);
        drop(waiting.now_or_never().expect("a place").unwrap());
        let line = places.lock();
        assert_eq!((line.all, line.clients.len()), (0, 0));
        drop(line);
        drop(first);
    }

    #[tokio::test]
    async fn the_line_has_an_end() {
        let places = Places::new(2);
        let _taken = (places.take(ip(1)).await.unwrap(), places.take(ip(2)).await.unwrap());
        let mut waiting = Vec::new();
        for last in [1, 1, 1, 1, 3, 3, 3] {
            let mut one = Box::pin(places.take(ip(last)));
            assert!(one.as_mut().now_or_never().is_none());
            waiting.push(one);
        }
        assert_eq!(places.take(ip(1)).await.unwrap_err(), NoPlace, "four of one client wait");
        assert_eq!(places.take(ip(4)).await.unwrap_err(), NoPlace, "eight in all");
    }
}
