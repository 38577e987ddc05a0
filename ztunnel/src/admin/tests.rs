use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
};

use super::*;
use crate::{
    identity::Identity,
    mesh::{
        Mesh,
        tests::{service, workload},
    },
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
        web.services.insert(service.key(), [].into());
        let admin = Admin {
            store: Arc::new(Store::new(Mesh::new([web], [service], []))),
            certificates: Certificates::new(&config).unwrap(),
            logging: Logging::for_tests("info"),
            metrics: Arc::new(Metrics::new()),
            readiness: Readiness::default(),
            workload_state: Arc::new(|| json!({ "uid-1": { "state": "Up" } })),
            quit: CancellationToken::new(),
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
        let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n");
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
    drop(state);
    assert_eq!(ready().await, (500, pending));
    drop(second);
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
    bench.admin.certificates.get(&id).await.unwrap();
    let (status, body) = bench.get(ADMIN, "/config_dump").await;
    assert_eq!(status, 200);
    let dump: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(dump["config"]["node"], "node-a");
    assert_eq!(dump["workloads"][0]["name"], "web-1");
    assert_eq!(dump["services"][0]["service"]["vips"][0], "/10.96.0.1");
    assert_eq!(dump["services"][0]["endpoints"][0], "uid-web-1");
    assert_eq!(dump["workloadState"]["uid-1"]["state"], "Up");
    let certificate = &dump["certificates"][0];
    assert_eq!(certificate["identity"], id.to_string());
    assert_eq!(certificate["state"], "Available");
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
