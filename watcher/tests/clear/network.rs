//! The network of a pod: which addresses it has, and its veth on the node's bridge.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use nix::net::if_::if_nametoindex;
use testbed::{
    cluster::ClusterNode,
    command::{run, run_quietly},
    netns::TestNetns,
};

/// Where a pod is on its node: addresses follow from it, and are used again by later pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// 1 or 2.
    pub node: u8,
    /// From 10 to 120.
    pub host: u8,
}

impl Place {
    /// What the source of pods tells.
    pub fn told(self) -> [IpAddr; 2] {
        let Self { node, host } = self;
        let v6 = Ipv6Addr::new(0xfd77, node.into(), 0, 0, 0, 0, 0, host.into());
        [Ipv4Addr::new(10, 77, node, host).into(), v6.into()]
    }

    /// What it does not tell: a second address, and those of the link.
    fn untold(self) -> [IpAddr; 3] {
        let Self { node, host } = self;
        let by_hand = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x77, self.number());
        [Ipv4Addr::new(10, 77, node, host + 120).into(), by_hand.into(), self.made_by_kernel()]
    }

    /// The address of the link that follows from the hardware address.
    fn made_by_kernel(self) -> IpAddr {
        Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0xadff, 0xfe17, self.number()).into()
    }

    fn number(self) -> u16 {
        u16::from(self.node) << 8 | u16::from(self.host)
    }

    /// All addresses of the pod's interface.
    pub fn addresses(self) -> Vec<IpAddr> {
        self.told().into_iter().chain(self.untold()).collect()
    }
}

/// The netns of a pod with its veth; both go when this does.
#[derive(Debug)]
pub struct Network {
    /// The pod's netns.
    pub netns: TestNetns,
    /// The index of the node's end.
    pub device: u32,
    remove: String,
}

impl Network {
    /// Makes it as a network plugin of the bridge's kind does. `serial` is no other pod's.
    pub fn new(node: &ClusterNode, place: Place, serial: usize) -> Self {
        let netns = TestNetns::new(format!("{}-{serial}", node.netns));
        let Place { node: number, host } = place;
        let outside = format!("v{serial}");
        let mut script = format!(
            "ip -n {node} link add {outside} type veth peer name eth0 netns {netns}
             ip -n {netns} link set eth0 address 02:00:ad:17:{number:02x}:{host:02x}\n",
            node = node.netns,
        );
        for address in place.addresses() {
            let more = match address {
                IpAddr::V4(_) => "/24",
                IpAddr::V6(_) => "/64 nodad",
            };
            if address != place.made_by_kernel() {
                let _ = writeln!(script, "ip -n {netns} addr add {address}{more} dev eth0");
            }
        }
        let _ = write!(
            script,
            "ip -n {node} link set {outside} master pods up
             ip -n {netns} link set eth0 up
             ip -n {netns} route add default via 10.77.{number}.1
             ip -n {netns} -6 route add default via fd77:{number}::1",
            node = node.netns,
        );
        run(&script);
        let device = node.netns.enter(|| if_nametoindex(outside.as_str())).expect("the device");
        Self { netns, device, remove: format!("ip -n {} link del {outside}", node.netns) }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        run_quietly(&self.remove);
    }
}
