//! What pods must not do, and whether they did it.

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, SocketAddr},
};

use testbed::capture::{MARK, Micros, Seen};

/// Which pod; a pod that starts anew is another one.
pub type PodId = usize;

/// A time in which a pod must be closed.
#[derive(Clone, Copy, Debug)]
struct Span {
    from: Micros,
    until: Option<Micros>,
    /// Whether what began before is cut at its beginning.
    cuts: bool,
}

#[derive(Debug)]
struct Pod {
    name: String,
    addresses: Vec<IpAddr>,
    spans: Vec<Span>,
}

/// Something that must not be.
#[derive(Clone, Debug)]
pub struct Violation {
    /// When it was.
    pub at: Micros,
    what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

/// Knows when each pod must be closed, and judges what was seen of it.
#[derive(Debug, Default)]
pub struct Judge {
    pods: Vec<Pod>,
    /// By node and index, which are numbers of the node's netns.
    devices: HashMap<(usize, u32), PodId>,
    /// When each connection of a pod was seen first, and the sequence number with which it began.
    begun: HashMap<(PodId, SocketAddr, SocketAddr), (Micros, u32)>,
}

impl Judge {
    /// A pod with these addresses, whose packets come in by `device`, a node and an index there. It need not be closed yet.
    pub fn add(&mut self, name: &str, device: (usize, u32), addresses: Vec<IpAddr>) -> PodId {
        self.pods.push(Pod { name: name.to_owned(), addresses, spans: Vec::new() });
        self.devices.insert(device, self.pods.len() - 1);
        self.pods.len() - 1
    }

    /// From `at` on the pod must be closed; with `cuts`, what is open by then must end, too.
    pub fn close(&mut self, pod: PodId, at: Micros, cuts: bool) {
        if !self.is_closed(pod) {
            self.pods[pod].spans.push(Span { from: at, until: None, cuts });
        }
    }

    /// From `at` on it need not be closed.
    pub fn open(&mut self, pod: PodId, at: Micros) {
        if let Some(span) = self.pods[pod].spans.last_mut().filter(|span| span.until.is_none()) {
            span.until = Some(at);
        }
    }

    /// Whether it must be closed now.
    pub fn is_closed(&self, pod: PodId) -> bool {
        self.pods[pod].spans.last().is_some_and(|span| span.until.is_none())
    }

    /// Judges packets of a node in the order in which they were captured.
    pub fn packets(&mut self, node: usize, seen: &[Seen]) -> Option<Violation> {
        let mut first = None;
        for packet in seen {
            let violation = self.packet(node, packet);
            first = first.or(violation);
        }
        first
    }

    fn packet(&mut self, node: usize, Seen { at, device, segment }: &Seen) -> Option<Violation> {
        let pod = *self.devices.get(&(node, *device))?;
        let connection = (pod, segment.from, segment.to);
        // The tunnel's listener, while somebody outside the mesh is still shaking hands: the kernel answers
        // a segment outside of the window with an acknowledgement that has the class of that segment
        // (tcp_v4_reqsk_send_ack). Of an application's connection the first segment was seen.
        let is_answer = segment.class == MARK && segment.is_bare_acknowledgement();
        if is_answer && !self.begun.contains_key(&connection) && !self.is_enrolled(segment.to.ip(), *at) {
            return None;
        }
        let begun = self.begun.entry(connection).or_insert((*at, segment.number));
        // The same number: the first segment once more.
        if segment.is_first() && begun.1 != segment.number {
            *begun = (*at, segment.number);
        }
        let begun = begun.0;
        let span = self.pods[pod].span_at(*at)?;
        if segment.is_reset() || self.pods[pod].span_at(begun).is_none() && !span.cuts {
            return None;
        }
        let own = if segment.class == MARK { "its own socket" } else { "another's socket" };
        let after = at - span.from;
        let age = at - begun;
        Some(Violation {
            at: *at,
            what: format!(
                "{}: a packet in clear by {own}: {segment}; closed since {after} µs, connection seen since {age} µs",
                self.pods[pod].name
            ),
        })
    }

    /// Whether a pod with that address must be closed at that time, so that its tunnel carries what it
    /// opens.
    fn is_enrolled(&self, address: IpAddr, at: Micros) -> bool {
        self.pods.iter().any(|pod| pod.addresses.contains(&address) && pod.span_at(at).is_some())
    }

    /// Judges that a client without identity was served at `to` by a connection that lasted from
    /// `began` to `ended`.
    pub fn served(&self, client: &str, began: Micros, ended: Micros, to: IpAddr) -> Option<Violation> {
        let pod =
            self.pods.iter().find(|pod| pod.addresses.contains(&to) && pod.is_closed_over(began, ended))?;
        let what =
            format!("{}: past the policy: {client} was served at {to}, in {} µs", pod.name, ended - began);
        Some(Violation { at: began, what })
    }

    /// Judges that the application in `pod` accepted a client without identity at `at`.
    pub fn accepted(&self, pod: PodId, at: Micros, from: IpAddr) -> Option<Violation> {
        // What was on its way when the pod had to be closed first.
        const HANDSHAKE: Micros = 1_000_000;
        let pod = &self.pods[pod];
        pod.is_closed_over(at.saturating_sub(HANDSHAKE), at).then(|| Violation {
            at,
            what: format!("{}: past the policy: the application accepted {from}", pod.name),
        })
    }
}

impl Pod {
    fn span_at(&self, at: Micros) -> Option<Span> {
        self.spans
            .iter()
            .rev()
            .copied()
            .find(|span| span.from <= at && span.until.is_none_or(|until| at < until))
    }

    fn is_closed_over(&self, from: Micros, until: Micros) -> bool {
        self.span_at(from).is_some_and(|span| span.until.is_none_or(|end| until < end))
    }
}

#[cfg(test)]
mod tests {
    use testbed::capture::segment::Segment;

    use super::*;

    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;

    fn seen(at: Micros, flags: u8, number: u32) -> Seen {
        let segment = Segment {
            from: "10.0.0.1:5000".parse().unwrap(),
            to: "10.0.0.2:8080".parse().unwrap(),
            class: 0,
            flags,
            number,
            payload: 0,
        };
        Seen { at, device: 7, segment }
    }

    #[test]
    fn a_connection_counts_by_when_it_began() {
        let mut judge = Judge::default();
        let pod = judge.add("p", (0, 7), vec![]);
        assert!(
            judge.packets(0, &[seen(1, SYN, 100), seen(2, ACK, 101)]).is_none(),
            "need not be closed yet"
        );
        judge.close(pod, 10, false);
        // Its first segment again, its data, and how it ends.
        let old = [seen(11, SYN, 100), seen(12, ACK, 101), seen(13, RST, 101)];
        assert!(judge.packets(0, &old).is_none());
        // The same ports, another connection.
        let found = judge.packets(0, &[seen(14, SYN, 7000)]).unwrap().to_string();
        assert!(found.contains("closed since 4 µs, connection seen since 0 µs"), "{found}");
        judge.open(pod, 20);
        assert!(judge.packets(0, &[seen(21, SYN, 9000)]).is_none());
        judge.close(pod, 30, true);
        assert!(judge.packets(0, &[seen(31, RST, 9001)]).is_none(), "a reset cuts it");
        assert!(judge.packets(0, &[seen(32, ACK, 9001)]).is_some(), "it is not cut");
        assert!(judge.packets(0, &[Seen { device: 8, ..seen(33, SYN, 1) }]).is_none(), "nobody's device");
        assert!(judge.packets(1, &[seen(34, SYN, 2)]).is_none(), "another node's");
    }

    #[test]
    fn an_answer_to_a_handshake_with_the_tunnel_is_not_the_applications() {
        let marked = |at, flags, number| {
            let mut seen = seen(at, flags, number);
            seen.segment.class = MARK;
            seen
        };
        let mut judge = Judge::default();
        let pod = judge.add("p", (0, 7), vec![]);
        judge.close(pod, 1, false);
        assert!(judge.packets(0, &[marked(2, ACK, 5)]).is_none());
        assert!(judge.packets(0, &[marked(3, ACK, 5)]).is_none());
        let mut data = marked(4, ACK, 5);
        data.segment.payload = 1;
        assert!(judge.packets(0, &[data]).is_some(), "data");
        assert!(judge.packets(0, &[marked(5, ACK, 6)]).is_some(), "and what follows it");
        let client = judge.add("client", (0, 8), vec!["10.0.0.2".parse().unwrap()]);
        judge.close(client, 6, false);
        let mut leaks = marked(7, ACK, 5);
        leaks.segment.to = "10.0.0.2:8082".parse().unwrap();
        assert!(judge.packets(0, &[leaks]).is_some(), "what a tunnel delivered, on a wrong way");
    }

    #[test]
    fn the_policy_holds_for_connections_that_lie_in_one_span() {
        let mut judge = Judge::default();
        let address: IpAddr = "10.0.0.1".parse().unwrap();
        let pod = judge.add("p", (0, 7), vec![address]);
        judge.close(pod, 10, false);
        judge.open(pod, 20);
        assert!(judge.served("x", 9, 15, address).is_none());
        assert!(judge.served("x", 15, 20, address).is_none());
        assert!(judge.served("x", 11, 19, address).is_some());
        assert!(judge.served("x", 11, 19, "10.0.0.9".parse().unwrap()).is_none());
    }
}
