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
    assert!(matches!(config.ca, Ca::Development { folder } if folder.ends_with("adit/development-ca")));
}

#[test]
fn an_ill_formed_value_is_named_with_what_was_expected() {
    for (key, value, message) in [
        ("IPV6_ENABLED", "maybe", r#"IPV6_ENABLED="maybe": expected true or false"#),
        ("PROXY_MODE", "node", r#"PROXY_MODE="node": expected shared or dedicated"#),
        ("PACKET_MARK", "-1", r#"PACKET_MARK="-1": expected a number of 32 bits"#),
        ("SECRET_TTL", "24", r#"SECRET_TTL="24": expected a duration such as 500ms, 30s, 5m or 1h30m"#),
        ("SECRET_TTL", "1s", r#"SECRET_TTL="1s": expected at least 10s"#),
        ("ADMIN_ADDR", "0.0.0.0:15000", r#"ADMIN_ADDR="0.0.0.0:15000": expected a loopback address"#),
        ("CA_ADDRESS", "http://ca:1", r#"CA_ADDRESS="http://ca:1": expected an https address"#),
        ("KEEPALIVE_RETRIES", "0", r#"KEEPALIVE_RETRIES="0": expected a number from 1 to 127"#),
        ("HTTP2_FRAME_SIZE", "100", r#"HTTP2_FRAME_SIZE="100": expected 16384 to 16777215"#),
    ] {
        assert_eq!(refusal(&[(key, value)]), message);
    }
    for workers in ["-1", "0%", "101%", "many", "2000"] {
        assert!(refusal(&[("ZTUNNEL_WORKER_THREADS", workers)]).contains("ZTUNNEL_WORKER_THREADS"));
    }
}

#[test]
fn what_cannot_be_ignored_is_refused_and_its_harmless_form_is_not() {
    for key in ["XDS_ADDRESS", "CRL_PATH", "TLS12_ENABLED", "COMPLIANCE_POLICY"] {
        assert!(refusal(&[(key, "true")]).starts_with(key));
    }
    assert!(refusal(&[("ENABLE_PROXY", "false")]).starts_with("ENABLE_PROXY"));
    config(&[("TLS12_ENABLED", "false"), ("ENABLE_PROXY", "true"), ("XDS_ADDRESS", "")]).unwrap();
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
fn who_signs() {
    let service = |vars: &[(&str, &str)]| match config(vars).unwrap().ca {
        Ca::Service(service) => service,
        other @ Ca::Development { .. } => panic!("{other:?}"),
    };
    let ca = service(&[("CA_ADDRESS", "istiod:15012"), ("AUTH_TOKEN", "a.b.c"), ("CA_HEADER_X_TENANT", "7")]);
    assert_eq!(ca.address, "https://istiod:15012");
    assert_eq!(ca.token, Token::Literal("a.b.c".to_owned()));
    assert_eq!(ca.headers.0, BTreeMap::from([("X_TENANT".to_owned(), "7".to_owned())]));
    assert!(ca.impersonate);
    // In a cluster the development CA must have been asked for.
    let in_cluster = ("KUBERNETES_SERVICE_HOST", "10.0.0.1");
    assert_eq!(service(&[in_cluster]).address, "https://istiod.istio-system.svc:15012");
    for asked in [("DEVELOPMENT_CA_DIR", "/ca"), ("FAKE_CA", "true")] {
        assert!(matches!(config(&[in_cluster, asked]).unwrap().ca, Ca::Development { .. }));
    }
    let both = [("FAKE_CA", "true"), ("CA_ADDRESS", "https://ca:1")];
    assert!(matches!(config(&both).unwrap().ca, Ca::Development { .. }));
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
    let Ca::Service(service) = config.ca else { unreachable!("CA_ADDRESS is set") };
    assert!(!format!("{service:?}").contains("very-secret"));
}
