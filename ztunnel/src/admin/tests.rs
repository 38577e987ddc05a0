use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::json;

use super::*;
use crate::{
    direction::Direction,
    identity::Identity,
    mesh::{
        Mesh,
        tests::{service, workload},
    },
    record::{ConnectionEnds, ConnectionRecord},
};

struct Bench {
    admin: Admin,
    addresses: [SocketAddr; 3],
    stop: CancellationToken,
    serving: JoinHandle<io::Result<()>>,
    _folder: tempfile::TempDir,
}

const ADMIN: usize = 0;
const STATS: usize = 1;
const READINESS: usize = 2;

fn config(folder: &std::path::Path) -> Config {
    let vars = [
        ("DEVELOPMENT_CA_DIR", folder.to_str().unwrap()),
        ("ADMIN_ADDR", "127.0.0.1:0"),
        ("STATS_ADDR", "127.0.0.1:0"),
        ("READINESS_ADDR", "127.0.0.1:0"),
        ("NODE_NAME", "node-a"),
    ];
    Config::from_vars(vars.map(|(key, value)| (key.to_owned(), value.to_owned()))).unwrap()
}

impl Bench {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = Arc::new(config(folder.path()));
        let mut web = workload("web-1", "10.0.0.2");
        let service = service("web", "10.96.0.1");
        web.services.insert(service.key(), Arc::new([].into()));
        let admin = Admin {
            store: Arc::new(Store::new(Mesh::new([web], [service], []))),
            certificates: Certificates::new(&config, Arc::default()).unwrap(),
            logging: Logging::for_tests("info"),
            metrics: Arc::new(Metrics::default()),
            readiness: Readiness::default(),
            workload_state: Arc::new(|| {
                let info = json!({ "name": "web-1", "namespace": "default", "serviceAccount": "web" });
                json!({ "uid-1": { "state": "Up", "info": info } })
            }),
            quit: CancellationToken::new(),
            last_state: None,
            started: SystemTime::now(),
            config: Arc::clone(&config),
        };
        let servers = Servers::bind(&config).await.unwrap();
        let (addresses, stop) = (servers.addresses().unwrap(), CancellationToken::new());
        let serving = tokio::spawn(servers.serve(admin.clone(), stop.clone()));
        Self { admin, addresses, stop, serving, _folder: folder }
    }

    /// Status, head and body of the answer.
    async fn ask(&self, server: usize, method: &str, path: &str, headers: &str) -> (u16, String, String) {
        let mut stream = TcpStream::connect(self.addresses[server]).await.unwrap();
        let host = if headers.contains("Host:") { "" } else { "Host: localhost:15000\r\n" };
        let request = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n{host}{headers}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), head.to_lowercase(), body.to_owned())
    }

    async fn get(&self, server: usize, path: &str) -> (u16, String) {
        let (status, _, body) = self.ask(server, "GET", path, "").await;
        (status, body)
    }
}

#[tokio::test]
async fn ready_means_that_nothing_is_pending() {
    let bench = Bench::start().await;
    let ready = || bench.get(READINESS, "/healthz/ready");
    assert_eq!(ready().await, (200, "ready\n".to_owned()));
    let mut proxy = bench.admin.readiness.task("workload proxy manager");
    let state = bench.admin.readiness.task("state manager");
    let second = bench.admin.readiness.task("state manager");
    let pending = "not ready, pending: state manager, workload proxy manager\n".to_owned();
    assert_eq!(ready().await, (500, pending.clone()));
    state.done();
    assert_eq!(ready().await, (500, pending));
    second.done();
    proxy.ready();
    proxy.ready();
    assert_eq!(ready().await.0, 200);
    proxy.pending();
    assert_eq!(ready().await, (500, "not ready, pending: workload proxy manager\n".to_owned()));
}

#[tokio::test]
async fn metrics_come_under_both_paths_and_in_the_type_asked_for() {
    let bench = Bench::start().await;
    for path in ["/metrics", "/stats/prometheus"] {
        let (status, head, body) = bench.ask(STATS, "GET", path, "").await;
        assert_eq!(status, 200);
        assert!(head.contains("content-type: text/plain"), "{head}");
        assert!(body.contains("istio_build{component=\"ztunnel\""), "{body}");
    }
    let accept = "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n";
    let (_, head, body) = bench.ask(STATS, "GET", "/metrics", accept).await;
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(body.ends_with("# EOF\n"), "{body}");
}

#[tokio::test]
async fn the_dump_shows_what_is_known() {
    let bench = Bench::start().await;
    tokio::spawn(Arc::clone(&bench.admin.certificates).run(bench.stop.clone()));
    let id: Identity = "spiffe://cluster.local/ns/default/sa/web".parse().unwrap();
    let _lease = bench.admin.certificates.lease(Arc::clone(&id.namespace), Arc::clone(&id.service_account));
    bench.admin.certificates.get(&id).await.unwrap();
    let (status, body) = bench.get(ADMIN, "/config_dump").await;
    assert_eq!(status, 200);
    let dump: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(dump["config"]["node"], "node-a");
    assert_eq!(dump["workloads"][0]["name"], "web-1");
    // Under the names by which istioctl reads them.
    assert_eq!(dump["workloads"][0]["status"], "Healthy");
    assert_eq!(dump["services"][0]["vips"][0], "/10.96.0.1");
    assert_eq!(dump["services"][0]["endpoints"]["uid-web-1"]["workloadUid"], "uid-web-1");
    assert_eq!(dump["workloadState"]["uid-1"]["state"], "Up");
    let certificate = &dump["certificates"][0];
    assert_eq!(certificate["identity"], id.to_string());
    assert_eq!(certificate["state"], "Available");
    let serial = certificate["certChain"][0]["serialNumber"].as_str().unwrap();
    assert!(serial.len() > 10 && serial.bytes().all(|digit| digit.is_ascii_digit()), "{serial}");
    let pem = BASE64_STANDARD.decode(certificate["certChain"][0]["pem"].as_str().unwrap()).unwrap();
    let pem = String::from_utf8(pem).unwrap();
    assert!(pem.starts_with("-----BEGIN CERTIFICATE-----\n"), "{pem}");
    assert!(!body.contains("PRIVATE"), "keys stay here");
}

#[tokio::test]
async fn the_log_filter_is_shown_changed_and_reset() {
    let bench = Bench::start().await;
    let logging = |query: &'static str| bench.ask(ADMIN, "POST", query, "");
    assert_eq!(logging("/logging").await.2, "current log level is info\n");
    assert_eq!(logging("/logging?level=debug").await.2, "current log level is debug\n");
    assert_eq!(logging("/logging?level=h2%3Dwarn").await.2, "current log level is h2=warn,debug\n");
    let (status, _, body) = logging("/logging?level=h2%3Dloud").await;
    assert_eq!(status, 400);
    assert!(body.contains("h2=loud"), "{body}");
    assert_eq!(logging("/logging?reset").await.2, "current log level is info\n");
    assert_eq!(bench.get(ADMIN, "/logging").await.0, 405);
}

#[tokio::test]
async fn quitting_is_asked_for_by_post_on_the_admin_server_only() {
    let bench = Bench::start().await;
    assert_eq!(bench.get(ADMIN, "/quitquitquit").await.0, 405);
    for server in [STATS, READINESS] {
        assert_eq!(bench.ask(server, "POST", "/quitquitquit", "").await.0, 404);
        assert_eq!(bench.get(server, "/config_dump").await.0, 404);
    }
    assert!(!bench.admin.quit.is_cancelled());
    assert_eq!(bench.ask(ADMIN, "POST", "/quitquitquit", "").await.0, 200);
    assert!(bench.admin.quit.is_cancelled());
    bench.stop.cancel();
    bench.serving.await.unwrap().unwrap();
}

#[tokio::test]
async fn an_address_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let config = Config { stats_address: taken.local_addr().unwrap(), ..config(folder.path()) };
    let error = Servers::bind(&config).await.unwrap_err().to_string();
    assert_eq!(error, format!("cannot listen on {} for metrics", config.stats_address));
}

/// A connection of pod `default/web-1` to itself.
fn open(bench: &Bench) -> ConnectionRecord {
    let web = Arc::new(workload("web-1", "10.0.0.2"));
    let mut ends = ConnectionEnds::new(
        Direction::Outbound,
        "10.0.0.2:4000".parse().unwrap(),
        "10.0.0.2:80".parse().unwrap(),
    );
    ends.source_workload = Some(Arc::clone(&web));
    ends.destination_workload = Some(web);
    ConnectionRecord::open(&bench.admin.metrics, ends)
}

#[tokio::test]
async fn the_dump_shows_connections_at_their_pod_while_they_are_open() {
    let bench = Bench::start().await;
    let record = open(&bench);
    record.counters().sent(7);
    let dump = || async {
        let (_, body) = bench.get(ADMIN, "/config_dump").await;
        serde_json::from_str::<serde_json::Value>(&body).unwrap()["workloadState"]["uid-1"]["connections"]
            .clone()
    };
    let connections = dump().await;
    let shown = &connections["outbound"][0];
    assert_eq!(shown["src"], "10.0.0.2:4000");
    assert_eq!(shown["originalDst"], "10.0.0.2:80");
    assert_eq!(shown["protocol"], "TCP");
    assert_eq!(shown["bytesSent"], 7);
    assert_eq!(connections["inbound"], json!([]));
    record.close(Ok(()));
    assert_eq!(dump().await["outbound"], json!([]));
}

#[tokio::test]
async fn the_status_and_the_page_show_the_same_and_names_cannot_break_out() {
    let bench = Bench::start().await;
    let _state = bench.admin.readiness.task("state manager");
    let record = open(&bench);
    drop(open(&bench)); // cut
    let (status, body) = bench.get(ADMIN, "/status").await;
    assert_eq!(status, 200);
    let overview: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(overview["ready"], false);
    assert_eq!(overview["pending"], json!(["state manager"]));
    assert_eq!(overview["pods"][0]["outbound"], 1);
    assert_eq!(overview["connectionsOpen"], 1);
    assert_eq!(overview["failures"], json!([{ "direction": "outbound", "reason": "cut", "count": 1 }]));
    assert_eq!(overview["lastFailures"][0]["error"], "connection cut");
    let (status, head, page) = bench.ask(ADMIN, "GET", "/", "").await;
    assert_eq!(status, 200);
    assert!(head.contains("content-type: text/html"), "{head}");
    for part in ["not ready: state manager", "node-a", "default/web-1", "10.0.0.2:4000", "<code>cut</code>"] {
        assert!(page.contains(part), "{part} in {page}");
    }
    assert!(!page.contains("src=") && !page.contains("@import") && !page.contains("http"), "loads nothing");
    drop(record);
}

/// `istioctl` asks for gzip, as every client written in Go does.
#[tokio::test]
async fn answers_are_compressed_as_asked() {
    let bench = Bench::start().await;
    let encodings = ["gzip", "br", "zstd", "deflate"];
    let pages = [(STATS, "/metrics"), (ADMIN, "/config_dump"), (ADMIN, "/status"), (ADMIN, "/")];
    for ((server, path), encoding) in pages.iter().flat_map(|page| encodings.map(|encoding| (page, encoding)))
    {
        let mut stream = TcpStream::connect(bench.addresses[*server]).await.unwrap();
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAccept-Encoding: {encoding}\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        let head = String::from_utf8_lossy(&answer).to_lowercase();
        assert!(head.contains(&format!("content-encoding: {encoding}\r\n")), "{path} as {encoding}: {head}");
        assert!(!head.contains("istio_build"), "{encoding} left it readable");
        let is_whole = head.contains("content-length: ") || answer.ends_with(b"\r\n0\r\n\r\n");
        assert!(is_whole, "{path} as {encoding} has no end: {head}");
    }
}

#[tokio::test]
async fn a_page_of_another_site_cannot_change_anything() {
    let bench = Bench::start().await;
    let quit = |origin: &'static str| bench.ask(ADMIN, "POST", "/quitquitquit", origin);
    for origin in ["https://example.org", "null", "http://10.0.0.1:15000", "http://localhost.example.org"] {
        let header: &'static str = Box::leak(format!("Origin: {origin}\r\n").into_boxed_str());
        assert_eq!(quit(header).await.0, 403, "{origin}");
    }
    // By a name that was made to point here, and from a page that cannot read the answer.
    for header in ["Host: example.org\r\n", "Sec-Fetch-Site: cross-site\r\n"] {
        for path in ["/config_dump", "/debug/pprof/profile?seconds=1", "/debug/pprof/heap/profiling"] {
            assert_eq!(bench.ask(ADMIN, "GET", path, header).await.0, 403, "{header}");
        }
    }
    for host in ["127.0.0.1:15000", "[::1]:15000", "localhost"] {
        let header = format!("Host: {host}\r\n");
        assert_eq!(bench.ask(ADMIN, "GET", "/status", &header).await.0, 200, "{host}");
    }
    assert!(!bench.admin.quit.is_cancelled());
    assert_eq!(quit("Origin: http://localhost:15000\r\n").await.0, 200);
}

#[tokio::test]
async fn profiles_want_sane_arguments() {
    let bench = Bench::start().await;
    for query in ["seconds=0", "seconds=301", "frequency=0", "frequency=1001", "seconds=x"] {
        assert_eq!(bench.get(ADMIN, &format!("/debug/pprof/profile?{query}")).await.0, 400, "{query}");
    }
    assert_eq!(bench.get(STATS, "/debug/pprof/heap").await.0, 404);
}
