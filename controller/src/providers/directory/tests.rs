use super::*;

fn parse(text: &str) -> (Vec<String>, Vec<String>) {
    let parsed = parse_text(Path::new("m.yaml"), text);
    (
        parsed
            .documents
            .iter()
            .map(|d| format!("{}:{}", d.line, d.object.key()))
            .collect(),
        parsed.mistakes.iter().map(Mistake::to_string).collect(),
    )
}

#[test]
fn documents_of_a_file_with_their_lines() {
    let (documents, mistakes) = parse(
        "# a comment\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: demo}\n---\n\
         apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n---\napiVersion: v1\nkind: Pod\n\
         metadata: {name: web}\nspec: {containers: [{name: a}]}\n---\n",
    );
    assert_eq!(mistakes, Vec::<String>::new());
    assert_eq!(documents, ["3:Namespace demo", "11:Pod default/web"]);
}

#[test]
fn all_mistakes_are_reported_and_cost_only_their_document() {
    let (documents, mistakes) = parse(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  lables: {a: b}\nspec:\n  ports:\n  - port: http\n    nodePort: x\n\
         ---\nkind: Pod\n  apiVersion: v1\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: demo}\n",
    );
    assert_eq!(documents, ["14:Namespace demo"]);
    assert_eq!(mistakes.len(), 4, "{mistakes:#?}");
    assert!(mistakes[0].starts_with("m.yaml:5: Service default/web: metadata.lables: there is no"));
    assert!(mistakes[1].starts_with("m.yaml:8: Service default/web: spec.ports[0].port: invalid"));
    assert!(mistakes[2].starts_with("m.yaml:9: Service default/web: spec.ports[0].nodePort: inv"));
    assert!(mistakes[3].starts_with("m.yaml:12: cannot be parsed: "));
}
