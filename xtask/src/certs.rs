//! Certificates for trying TLS out. Not for production: the CA's key lies beside what it signs.

use std::path::PathBuf;

use crate::steps::Failed;

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
    let out = options.out.display();
    println!("wrote {out}/ca.pem and a pair for orchestratord and each node\n");
    println!(
        "ORCHESTRATORD_TLS_CERT={out}/orchestratord.pem ORCHESTRATORD_TLS_KEY={out}/orchestratord-key.pem \\"
    );
    println!("  ORCHESTRATORD_TLS_CLIENT_CA={out}/ca.pem ORCHESTRATORD_TLS_CA={out}/ca.pem orchestratord");
    for node in &options.nodes {
        println!("POOL_MANAGERD_TLS_CERT={out}/{node}.pem POOL_MANAGERD_TLS_KEY={out}/{node}-key.pem \\");
        println!(
            "  POOL_MANAGERD_TLS_CLIENT_CA={out}/ca.pem POOL_MANAGERD_TLS_CA={out}/ca.pem pool-managerd"
        );
    }
    Ok(())
}
