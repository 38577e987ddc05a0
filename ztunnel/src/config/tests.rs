use std::{collections::BTreeMap, fmt::Write};

use super::*;

fn config(vars: &[(&str, &str)]) -> Result<Config, ConfigError> {
    Config::from_vars(vars.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())))
}

fn refusal(vars: &[(&str, &str)]) -> String {
    config(vars).expect_err("must be refused").to_string()
}

#[test]
fn nothing_set_is_a_shared_tunnel_with_a_development_ca() {
    let config = config(&[]).unwrap();
    assert_eq!(config.mode, ProxyMode::Shared);
    assert_eq!(config.packet_mark, Some(1337));
    assert_eq!(config.zds_socket, PathBuf::from("/var/run/ztunnel/ztunnel.sock"));
    assert_eq!(&*config.trust_domain, "cluster.local");
    assert_eq!(config.h2.stream_window, 4 << 20);
    assert_eq!(config.pool.idle, Duration::from_mins(5));
    assert_eq!(config.drain_deadline, Duration::from_secs(5));
    assert_eq!(config.admin_address, "127.0.0.1:15000".parse().unwrap());
    assert_eq!(config.stats_address.port(), 15020);
    assert!(matches!(config.ca, CaConfig::Development { folder } if folder.ends_with("adit/development-ca")));
}

#[test]
fn an_ill_formed_value_is_named_with_what_was_expected() {
    for (key, value, message) in [
        ("IPV6_ENABLED", "maybe", r#"IPV6_ENABLED="maybe": expected true or false"#),
        ("PROXY_MODE", "node", r#"PROXY_MODE="node": expected shared or dedicated"#),
        ("PACKET_MARK", "-1", r#"PACKET_MARK="-1": expected a number of 32 bits"#),
        (
            "SECRET_TTL",
            "24",
            r#"SECRET_TTL="24": expected a duration of at least 10s, such as 30s, 5m or 1h30m"#,
        ),
        (
            "POOL_UNUSED_RELEASE_TIMEOUT",
            "5",
            r#"POOL_UNUSED_RELEASE_TIMEOUT="5": expected a duration such as 500ms, 30s, 5m or 1h30m"#,
        ),
        (
            "SECRET_TTL",
            "1s",
            r#"SECRET_TTL="1s": expected a duration of at least 10s, such as 30s, 5m or 1h30m"#,
        ),
        ("ADMIN_ADDR", "0.0.0.0:15000", r#"ADMIN_ADDR="0.0.0.0:15000": expected a loopback address"#),
        (
            "CA_ADDRESS",
            "http://ca:1",
            r#"CA_ADDRESS="http://ca:1": expected an https address, or unix:/path"#,
        ),
        ("KEEPALIVE_RETRIES", "0", r#"KEEPALIVE_RETRIES="0": expected a number from 1 to 127"#),
        ("HTTP2_FRAME_SIZE", "100", r#"HTTP2_FRAME_SIZE="100": expected a number from 16384 to 16777215"#),
    ] {
        assert_eq!(refusal(&[(key, value)]), message);
    }
    for workers in ["-1", "0%", "101%", "many", "2000"] {
        assert!(refusal(&[("ZTUNNEL_WORKER_THREADS", workers)]).contains("ZTUNNEL_WORKER_THREADS"));
    }
}

#[test]
fn what_cannot_be_ignored_is_refused_and_its_harmless_form_is_not() {
    for (key, value) in [("ENABLE_PROXY", "false"), ("COMPLIANCE_POLICY", "fips")] {
        assert!(refusal(&[(key, value)]).starts_with(key), "{key}");
    }
    let both = refusal(&[("TLS12_ENABLED", "true"), ("COMPLIANCE_POLICY", "pqc")]);
    assert!(both.contains("COMPLIANCE_POLICY"), "{both}");
    let on_demand = [("XDS_ON_DEMAND", "true"), ("XDS_ADDRESS", "https://x:1")];
    assert!(refusal(&on_demand).contains("ISTIO_META_DNS_CAPTURE"));
    let without_dns = [on_demand[0], on_demand[1], ("ISTIO_META_DNS_CAPTURE", "false")];
    assert!(config(&without_dns).unwrap().xds.unwrap().on_demand);
    config(&[("XDS_ON_DEMAND", "false"), ("ENABLE_PROXY", "true"), ("XDS_ADDRESS", "")]).unwrap();
}

#[test]
fn durations_are_read_as_go_writes_them() {
    for (text, expected) in [
        ("250ms", Duration::from_millis(250)),
        ("1h30m", Duration::from_mins(90)),
        ("0", Duration::ZERO),
        ("90s", Duration::from_secs(90)),
    ] {
        let config = config(&[("CONNECTION_TERMINATION_DEADLINE", text)]).unwrap();
        assert_eq!(config.drain_deadline, expected, "{text}");
    }
    for text in ["s", "5", "5 s", "5d", "99999999999999999h"] {
        assert!(refusal(&[("CONNECTION_TERMINATION_DEADLINE", text)]).contains("a duration"), "{text}");
    }
}

#[test]
fn draining_ends_before_the_kubelet_kills() {
    for (grace, deadline) in [("30", 25), ("10", 9), ("60s", 55)] {
        let config = config(&[("TERMINATION_GRACE_PERIOD_SECONDS", grace)]).unwrap();
        assert_eq!(config.drain_deadline, Duration::from_secs(deadline), "{grace}");
    }
}

#[test]
fn dedicated_mode_names_its_workload_and_has_no_mark() {
    let config = config(&[("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", "shop/web-1/web")]).unwrap();
    assert_eq!(
        config.mode,
        ProxyMode::Dedicated {
            namespace: "shop".into(),
            name: "web-1".into(),
            service_account: "web".into()
        }
    );
    assert_eq!(config.packet_mark, None);
    assert!(refusal(&[("PROXY_MODE", "dedicated")]).starts_with("PROXY_WORKLOAD_INFO is not set"));
    for info in ["shop/web", "shop//web", "a/b/c/d"] {
        assert!(
            refusal(&[("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", info)]).contains("namespace/name")
        );
    }
}

#[test]
fn what_istios_daemonset_sets_comes_first_and_reaches_the_control_plane() {
    let set = [
        ("CLUSTER_ID", "old"),
        ("ISTIO_META_CLUSTER_ID", "east"),
        ("DNS_PROXY_ADDR", "127.0.0.1:1"),
        ("ISTIO_META_DNS_PROXY_ADDR", "127.0.0.1:15054"),
        ("ISTIO_META_DNS_CAPTURE", "true"),
        ("ISTIO_META_ENABLE_HBONE", "true"),
        ("XDS_ADDRESS", "istiod.istio-system.svc:15012"),
    ];
    let both = config(&set).unwrap();
    assert_eq!((&*both.cluster_id, both.dns.address.port()), ("east", 15054));
    let xds = both.xds.unwrap();
    assert_eq!(
        xds.service.address,
        ControlPlaneAddress::Https("https://istiod.istio-system.svc:15012".into())
    );
    assert_eq!(&*xds.service.cluster_id, "east");
    for (key, value) in [
        ("CLUSTER_ID", "east"),
        ("DNS_CAPTURE", "true"),
        ("DNS_PROXY_ADDR", "127.0.0.1:15054"),
        ("ENABLE_HBONE", "true"),
    ] {
        assert_eq!(xds.metadata[key], value, "{key}");
    }
    let ours = config(&[("CLUSTER_ID", "west"), ("DNS_PROXY_ADDR", "127.0.0.1:1")]).unwrap();
    assert_eq!((&*ours.cluster_id, ours.dns.address.port()), ("west", 1));
    assert!(refusal(&[("DNS_PROXY_ADDR", "x")]).starts_with("DNS_PROXY_ADDR="), "named as it was written");
}

#[test]
fn a_control_plane_may_be_a_socket_on_this_node() {
    for (address, path) in
        [("unix:/run/xds.sock", "/run/xds.sock"), ("unix:///run/xds.sock", "/run/xds.sock")]
    {
        let config = config(&[("XDS_ADDRESS", address), ("CA_ADDRESS", address)]).unwrap();
        let socket = ControlPlaneAddress::Socket(path.into());
        assert_eq!(config.xds.unwrap().service.address, socket);
        assert!(matches!(config.ca, CaConfig::Service { service, .. } if service.address == socket));
    }
    for address in ["unix:run/xds.sock", "unix://", "unix:", "http://localhost:1"] {
        assert!(refusal(&[("XDS_ADDRESS", address)]).contains("expected"), "{address}");
    }
}

#[test]
fn who_signs() {
    let service = |vars: &[(&str, &str)]| match config(vars).unwrap().ca {
        CaConfig::Service { service, .. } => service,
        other @ CaConfig::Development { .. } => panic!("{other:?}"),
    };
    let ca = service(&[("CA_ADDRESS", "istiod:15012"), ("AUTH_TOKEN", "a.b.c"), ("CA_HEADER_X_TENANT", "7")]);
    assert_eq!(ca.address.to_string(), "https://istiod:15012");
    assert_eq!(ca.token, Token::Literal("a.b.c".to_owned()));
    assert_eq!(ca.headers.0, BTreeMap::from([("X_TENANT".to_owned(), "7".to_owned())]));
    // In a cluster the development CA must have been chosen.
    let in_cluster = ("KUBERNETES_SERVICE_HOST", "10.0.0.1");
    assert_eq!(service(&[in_cluster]).address.to_string(), "https://istiod.istio-system.svc:15012");
    for chosen in [("DEVELOPMENT_CA_DIR", "/ca"), ("FAKE_CA", "true")] {
        assert!(matches!(config(&[in_cluster, chosen]).unwrap().ca, CaConfig::Development { .. }));
    }
    let both = [("FAKE_CA", "true"), ("CA_ADDRESS", "https://ca:1")];
    assert!(matches!(config(&both).unwrap().ca, CaConfig::Development { .. }));
}

#[test]
fn workers_by_number_share_or_all() {
    let workers = |text| config(&[("ZTUNNEL_WORKER_THREADS", text)]).unwrap().workers.get();
    let cores = std::thread::available_parallelism().unwrap().get();
    assert_eq!(workers("3"), 3);
    assert_eq!(workers("0"), cores);
    assert_eq!(workers("100%"), cores);
    assert_eq!(workers("1%"), 1);
}

#[test]
fn secrets_are_not_shown() {
    let config = config(&[
        ("CA_ADDRESS", "https://ca:1"),
        ("AUTH_TOKEN", "very-secret"),
        ("CA_HEADER_AUTHORIZATION", "very-secret"),
    ])
    .unwrap();
    assert!(!serde_json::to_string(&config).unwrap().contains("very-secret"));
    let CaConfig::Service { service, .. } = config.ca else { unreachable!("CA_ADDRESS is set") };
    assert!(!format!("{service:?}").contains("very-secret"));
}

fn from_file(text: &str, vars: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let vars = vars.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    Config::from_file_and_vars(Some(file.path()), vars)
}

/// The message without the file's name, which differs from run to run.
fn file_refusal(text: &str) -> String {
    let message = from_file(text, &[]).expect_err("must be refused").to_string();
    let lines = message.lines().map(|line| line.split_once(": ").map_or(line, |(_, rest)| rest));
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn the_file_sets_keys_and_the_environment_overrides_them() {
    let text = "
node: {name: from-file, network: n1}
pool:
  idle: 7s
  max_streams: 3
socket: {original_source: false, mark: 0x10}
ca:
  address: https://ca:1
  headers: {tenant: from-file, region: north}
";
    let vars = [("NODE_NAME", "from-environment"), ("CA_HEADER_tenant", "from-environment")];
    let config = from_file(text, &vars).unwrap();
    assert_eq!(&*config.node, "from-environment");
    assert_eq!(&*config.network, "n1");
    assert_eq!(config.pool.idle, Duration::from_secs(7));
    assert_eq!(config.pool.max_streams, 3);
    assert_eq!(config.original_source, Some(false));
    assert_eq!(config.packet_mark, Some(16));
    let CaConfig::Service { service: ca, .. } = &config.ca else { panic!("ca.address is set") };
    let headers = [("tenant", "from-environment"), ("region", "north")];
    assert_eq!(ca.headers.0, headers.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    let origin = |name| config.effective.iter().find(|key| key.key == name).unwrap().origin;
    assert_eq!(origin("node.name"), Origin::Environment);
    assert_eq!(origin("pool.idle"), Origin::File);
    assert_eq!(origin("pool.max_streams"), Origin::File);
    assert_eq!(origin("log.filter"), Origin::Default);
}

#[test]
fn an_empty_file_is_a_file_that_sets_nothing() {
    for text in ["", "# nothing\n", "pool:\n", "node:\n  name: ''\n  network:\n"] {
        assert_eq!(&*from_file(text, &[]).unwrap().node, "", "{text}");
    }
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_known_one() {
    for (text, message) in [
        ("pool: {ilde: 5m}", "unknown key pool.ilde, did you mean pool.idle?"),
        ("pol: {idle: 5m}", "unknown key pol, did you mean pool.idle?"),
        ("NODE_NAME: a", "unknown key NODE_NAME, did you mean node.name?"),
        ("max_streams: 5", "unknown key max_streams, did you mean pool.max_streams?"),
        ("xyzzy: 5", "unknown key xyzzy"),
    ] {
        assert_eq!(file_refusal(text), message, "{text}");
    }
}

#[test]
fn everything_that_is_wrong_with_a_file_is_said_at_once_with_key_and_expectation() {
    let text = "
pool: {idle: 5, max_streams: many}
node: name
ca: {headers: [a]}
log: {format: {x: y}}
";
    let message = file_refusal(text);
    for part in [
        r#"pool.idle="5": expected a duration such as 500ms, 30s, 5m or 1h30m"#,
        r#"pool.max_streams="many": expected a number from 1"#,
        r#"node="\"name\"": expected a section with keys"#,
        "ca.headers=",
        "log.format=",
    ] {
        assert!(message.contains(part), "{part} in\n{message}");
    }
    assert_eq!(message.lines().count(), 5, "{message}");
    assert!(from_file("- a\n", &[]).unwrap_err().to_string().contains("is not a YAML mapping"));
    assert!(from_file("a: [", &[]).unwrap_err().to_string().contains("is not a YAML mapping"));
    let missing = Config::from_file_and_vars(Some("/does/not/exist".as_ref()), []).unwrap_err();
    assert_eq!(missing.to_string(), "cannot read /does/not/exist");
}

#[test]
fn a_secret_is_hidden_wherever_it_was_written_wrongly_or_rightly() {
    let text = "ca: {address: https://ca:1, token: very-secret, headers: {authorization: very-secret}}";
    let config = from_file(text, &[]).unwrap();
    assert!(!serde_json::to_string(&config.effective).unwrap().contains("very-secret"));
    let wrong = from_file("ca: {token: [very-secret], headers: [very-secret]}", &[]).unwrap_err();
    assert!(!wrong.to_string().contains("very-secret"), "{wrong}");
}

#[test]
fn every_row_is_read_and_has_a_default_that_fits() {
    let source = include_str!("resolve.rs");
    let mut names = std::collections::BTreeSet::new();
    for key in keys::KEYS {
        for name in key.variables().chain([key.name]) {
            assert!(names.insert(name), "{name} is there twice");
        }
        assert!(source.contains(&format!("\"{}\"", key.name)), "nobody reads {}", key.name);
        if let keys::DefaultValue::Is(text) = key.default {
            assert!(text.is_empty() || value::fits(key.kind, text), "{}: {text}", key.name);
        }
    }
}

/// The table in the documentation is made from the rows: `UPDATE_DOCS=1 cargo test
/// documentation`.
#[test]
fn the_documentation_has_a_line_for_every_key() {
    let mut table = "| key | variable | value | default | |\n|---|---|---|---|---|\n".to_owned();
    for key in keys::KEYS {
        let default = match key.default {
            keys::DefaultValue::Is("") | keys::DefaultValue::Nothing => "–".to_owned(),
            keys::DefaultValue::Is(text) => format!("`{text}`"),
            keys::DefaultValue::Depends(words) => words.to_owned(),
        };
        let (variable, kind) = match key.kind {
            keys::ValueKind::Map => (format!("`{}*`", key.variable), key.kind.expectation()),
            kind => {
                let variables: Vec<_> = key.variables().map(|variable| format!("`{variable}`")).collect();
                (variables.join(", else "), kind.expectation())
            }
        };
        let _ = writeln!(table, "| `{}` | {variable} | {kind} | {default} | {} |", key.name, key.about);
    }
    testbed::doc_table::assert_current(
        "docs/configuration.md",
        "keys: made from ztunnel/src/config/keys.rs",
        &table,
    );
}
