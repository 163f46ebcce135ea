// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * C macros, inline functions and functions without a Rust binding, under names that Rust can call.
 * shim.rs declares each of them and says what it does.
 */
#include <linux/anon_inodes.h>
#include <linux/fs.h>
#include <linux/idr.h>
#include <linux/mm.h>
#include <linux/pci.h>
#include <linux/wait.h>

int barlink_number_alloc(void);
void barlink_number_free(int number);
u32 barlink_pci_address(struct pci_dev *pdev);
void barlink_init_event_queue(struct wait_queue_head *queue);
void barlink_init_sleeper_queue(struct wait_queue_head *queue);
struct file *barlink_anon_file(void);
pgprot_t barlink_pgprot_noncached(pgprot_t prot);
u32 barlink_granted_mode(struct vm_area_struct *vma, unsigned long address);

static DEFINE_IDA(numbers);

int barlink_number_alloc(void)
{
	return ida_alloc(&numbers, GFP_KERNEL);
}

void barlink_number_free(int number)
{
	ida_free(&numbers, number);
}

u32 barlink_pci_address(struct pci_dev *pdev)
{
	return (u32)pci_domain_nr(pdev->bus) << 16 | pci_dev_id(pdev);
}

/* Two functions, since each use of the macro is a lock class of its own, and one queue wakes the other. */
void barlink_init_event_queue(struct wait_queue_head *queue)
{
	init_waitqueue_head(queue);
}

void barlink_init_sleeper_queue(struct wait_queue_head *queue)
{
	init_waitqueue_head(queue);
}

struct file *barlink_anon_file(void)
{
	return anon_inode_create_getfile("barlink", &generic_ro_fops, NULL, O_RDONLY, NULL);
}

pgprot_t barlink_pgprot_noncached(pgprot_t prot)
{
	return pgprot_noncached(prot);
}

u32 barlink_granted_mode(struct vm_area_struct *vma, unsigned long address)
{
#ifdef CONFIG_X86
	/* In this order, since a mode that the CPU's PAT lacks shares its bits with uncached-minus. */
	static const enum page_cache_mode modes[] = {
		_PAGE_CACHE_MODE_UC_MINUS, _PAGE_CACHE_MODE_UC, _PAGE_CACHE_MODE_WC,
		_PAGE_CACHE_MODE_WT, _PAGE_CACHE_MODE_WP, _PAGE_CACHE_MODE_WB,
	};
	struct follow_pfnmap_args args = { .vma = vma, .address = address };
	unsigned long bits;
	u32 i;

	if (follow_pfnmap_start(&args))
		return 0;
	bits = pgprot_val(args.pgprot) & _PAGE_CACHE_MASK;
	follow_pfnmap_end(&args);

	for (i = 0; i < ARRAY_SIZE(modes); i++)
		if (cachemode2protval(modes[i]) == bits)
			return i + 1;
#endif
	return 0;
}
