//! What Istio's node agent leaves in the netns of the pods of its ambient mode, as it writes it.

use std::fmt::Write as _;

/// By which of the kernel's interfaces the agent works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// iptables, kept as nftables: what most nodes have.
    IptablesNft,
    /// iptables of the old kind.
    IptablesLegacy,
    /// nftables (`nativeNftables` of Istio's charts).
    Nftables,
}

/// Routing by mark, which all kinds have.
const ROUTING: &str = "
    ip rule add fwmark 0x111/0xfff pref 32764 lookup 100
    ip -6 rule add fwmark 0x111/0xfff pref 32764 lookup 100
    ip link set lo up
    ip route add local 0.0.0.0/0 dev lo table 100
    ip -6 route add local ::/0 dev lo table 100
";

/// The shell commands that set them in the netns where they run.
pub fn script(kind: Kind) -> String {
    let mut script = ROUTING.to_owned();
    for (program, own, probes) in [
        ("iptables", "127.0.0.1/32", "169.254.7.127"),
        ("ip6tables", "::1/128", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"),
    ] {
        let variant = match kind {
            Kind::IptablesNft => "nft",
            Kind::IptablesLegacy => "legacy",
            Kind::Nftables => continue,
        };
        let _ =
            writeln!(script, "{program}-{variant}-restore --noflush <<'END'\n{}END", iptables(own, probes));
    }
    if kind == Kind::Nftables {
        let _ = writeln!(script, "nft -f - <<'END'\n{NFTABLES}END");
    }
    script
}

/// With DNS capture, which is the default.
fn iptables(own: &str, probes: &str) -> String {
    format!(
        "*mangle
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
*nat
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A OUTPUT -j ISTIO_OUTPUT
-A PREROUTING -j ISTIO_PRERT
-A ISTIO_PRERT -s {probes} -p tcp -m tcp -j ACCEPT
-A ISTIO_PRERT ! -d {own} -p tcp -m tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006
-A ISTIO_OUTPUT -d {probes} -p tcp -m tcp -j ACCEPT
-A ISTIO_OUTPUT ! -o lo -p udp -m mark ! --mark 0x539/0xfff -m udp --dport 53 -j REDIRECT --to-ports 15053
-A ISTIO_OUTPUT ! -d {own} -p tcp -m tcp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053
-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A ISTIO_OUTPUT ! -d {own} -o lo -j ACCEPT
-A ISTIO_OUTPUT ! -d {own} -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
COMMIT
*raw
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -p udp -m mark --mark 0x539/0xfff -m udp --dport 53 -j CT --zone 1
-A ISTIO_PRERT -p udp -m mark ! --mark 0x539/0xfff -m udp --sport 53 -j CT --zone 1
COMMIT
"
    )
}

const NFTABLES: &str = "table inet istio-ambient-nat {
  chain prerouting { type nat hook prerouting priority -100; jump istio-prerouting; }
  chain output { type nat hook output priority -100; jump istio-output; }
  chain istio-prerouting {
    meta l4proto tcp ip saddr 169.254.7.127 counter accept
    ip daddr != 127.0.0.1/32 tcp dport != 15008 mark and 0xfff != 0x539 counter redirect to :15006
    ip6 daddr != ::1 tcp dport != 15008 mark and 0xfff != 0x539 counter redirect to :15006
  }
  chain istio-output {
    meta l4proto tcp ip daddr 169.254.7.127 counter accept
    oifname != \"lo\" mark and 0xfff != 0x539 udp dport 53 counter redirect to :15053
    meta l4proto tcp mark and 0xfff == 0x111 counter accept
    oifname \"lo\" ip daddr != 127.0.0.1/32 counter accept
    oifname \"lo\" ip6 daddr != ::1 counter accept
    meta l4proto tcp ip daddr != 127.0.0.1/32 mark and 0xfff != 0x539 counter redirect to :15001
    meta l4proto tcp ip6 daddr != ::1 mark and 0xfff != 0x539 counter redirect to :15001
  }
}
table inet istio-ambient-mangle {
  chain prerouting { type filter hook prerouting priority -150; jump istio-prerouting; }
  chain output { type route hook output priority -150; jump istio-output; }
  chain istio-prerouting { meta mark and 0xfff == 0x539 counter ct mark set ct mark and 0xfffff000 or 0x111; }
  chain istio-output { ct mark and 0xfff == 0x111 counter meta mark set ct mark; }
}
table inet istio-ambient-raw {
  chain prerouting { type filter hook prerouting priority -300; jump istio-prerouting; }
  chain output { type filter hook output priority -300; jump istio-output; }
  chain istio-prerouting { udp sport 53 meta mark and 0xfff != 0x539 counter ct zone set 1; }
  chain istio-output { udp dport 53 meta mark and 0xfff == 0x539 counter ct zone set 1; }
}
";
