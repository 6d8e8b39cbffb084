//! Certificates for trying TLS out. Not for production: the CA's key lies beside what it signs.

use std::net::IpAddr;
use std::path::PathBuf;

use crate::steps::Failed;

/// Where the daemons of the lines listen.
const CONTROL_PORT: u16 = 8080;
const FIRST_NODE_PORT: usize = 9200;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The directory that is filled.
    #[arg(long, default_value = ".cache/certs")]
    out: PathBuf,
    /// A node id; once for each node.
    #[arg(long = "node", default_value = "gpu-node-1")]
    nodes: Vec<String>,
    /// A name or an address by which the daemons are called; once for each.
    #[arg(long = "host", default_values = ["localhost", "127.0.0.1"])]
    hosts: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<(), Failed> {
    test_certs::write_cluster(&options.out, &options.nodes, &options.hosts).map_err(|error| {
        let cause = std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
        Failed(format!("{error}{cause}"))
    })?;
    println!("wrote {0}/ca.pem and a pair for orchestratord and each node into {0}\n", options.out.display());
    for line in lines(options) {
        println!("{line}");
    }
    Ok(())
}

/// Lines for a shell: a token, the control plane, each node, and a look at what came of it. The first host
/// is the control plane's, the next ones the nodes', as far as there are such.
fn lines(options: &Options) -> Vec<String> {
    let out = options.out.display();
    let is_here =
        |host: &String| host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    let here = options.hosts.iter().all(is_here);
    let bind = if here { "127.0.0.1" } else { "0.0.0.0" };
    let host = |n: usize| {
        let host = options.hosts.get(n).or(options.hosts.first()).map_or("localhost", String::as_str);
        if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
    };
    let tls = |prefix: &str, name: &str| {
        format!(
            "{prefix}_TLS_CERT={out}/{name}.pem {prefix}_TLS_KEY={out}/{name}-key.pem \\\n  {prefix}_TLS_CLIENT_CA={out}/ca.pem {prefix}_TLS_CA={out}/ca.pem"
        )
    };
    let control = format!("https://{}:{CONTROL_PORT}", host(0));
    let mut lines = vec![
        "export LLORCH_API_TOKEN=$(orchestratord token new)   # the same one on every machine".to_owned(),
        format!(
            "ORCHESTRATORD_CLOUD_PROFILE=true ORCHESTRATORD_ADDR={bind}:{CONTROL_PORT} \\\n  {} \\\n  orchestratord &",
            tls("ORCHESTRATORD", "orchestratord")
        ),
    ];
    for (n, node) in options.nodes.iter().enumerate() {
        let port = FIRST_NODE_PORT + n;
        let own = if here { host(0) } else { host(n + 1) };
        // Of several on one machine each has its own.
        let directories = if here && options.nodes.len() > 1 {
            format!(
                "  POOL_MANAGERD_RUNTIME_DIR={out}/{node}/engines POOL_MANAGERD_LOGS_DIR={out}/{node}/logs \\\n"
            )
        } else {
            String::new()
        };
        lines.push(format!(
            "ORCHESTRATORD_URL={control} POOL_MANAGERD_NODE_ID={node} POOL_MANAGERD_ADDR={bind}:{port} \\\n{directories}  POOL_MANAGERD_ADVERTISE_URL=https://{own}:{port} {} \\\n  pool-managerd &",
            tls("POOL_MANAGERD", node)
        ));
    }
    lines.push(format!(
        "curl --cacert {out}/ca.pem -H \"Authorization: Bearer $LLORCH_API_TOKEN\" {control}/v2/nodes"
    ));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(nodes: &[&str], hosts: &[&str]) -> String {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        lines(&Options { out: "certs".into(), nodes: owned(nodes), hosts: owned(hosts) }).join("\n")
    }

    // CLOUD-3024
    #[test]
    fn the_lines_name_the_machines_that_the_certificates_are_for() {
        let here = of(&["a", "b"], &["localhost", "127.0.0.1"]);
        assert!(here.contains("ORCHESTRATORD_URL=https://localhost:8080 POOL_MANAGERD_NODE_ID=b"), "{here}");
        assert!(here.contains("POOL_MANAGERD_ADDR=127.0.0.1:9201"), "a port each: {here}");
        let apart = of(&["a", "b"], &["10.0.0.5", "10.0.0.6"]);
        assert!(apart.contains("ORCHESTRATORD_ADDR=0.0.0.0:8080"), "{apart}");
        assert!(apart.contains("POOL_MANAGERD_ADVERTISE_URL=https://10.0.0.6:9200"), "{apart}");
        assert!(apart.contains("POOL_MANAGERD_ADVERTISE_URL=https://10.0.0.5:9201"), "{apart}");
        assert!(apart.ends_with("https://10.0.0.5:8080/v2/nodes"), "{apart}");
    }
}
