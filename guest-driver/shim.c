// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Wrappers of C macros and inline functions, and of functions without a Rust binding, under names
 * that Rust can call. shim.rs declares each of them and says what it does.
 */
#include <linux/anon_inodes.h>
#include <linux/eventfd.h>
#include <linux/fdtable.h>
#include <linux/fs.h>
#include <linux/idr.h>
#include <linux/io.h>
#include <linux/iommu.h>
#include <linux/mm.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/pm.h>
#include <linux/pm_domain.h>
#include <linux/scatterlist.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/spinlock.h>
#include <linux/sysfs.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/wait.h>

int barlink_number_alloc(void);
void barlink_number_free(int number);
u32 barlink_pci_address(struct device *dev);
struct device *barlink_dma_device(struct device *dev);
void barlink_flush_iommu(struct device *dev);
void barlink_follow_sleep(struct miscdevice *misc, bool follow);
const struct attribute_group **barlink_identity_attributes(void);
void barlink_lock_init(spinlock_t *lock);
unsigned long barlink_lock(spinlock_t *lock);
void barlink_unlock(spinlock_t *lock, unsigned long flags);
void barlink_init_event_queue(struct wait_queue_head *queue);
void barlink_init_sleeper_queue(struct wait_queue_head *queue);
struct file *barlink_anon_file(void);
struct file *barlink_buffer_file(const struct file_operations *operations, void *private);
u32 barlink_process_with(struct file *file);
pgprot_t barlink_pgprot(u32 mode, pgprot_t prot);
void __iomem *barlink_map_in_mode(u32 mode, u64 address, u64 size);
u32 barlink_granted_mode(struct vm_area_struct *vma, unsigned long address);
void barlink_read_barrier(void);

int barlink_virtio_register(void);
void barlink_virtio_unregister(void);
struct device *barlink_virtio_dev(struct virtio_device *vdev);
u32 barlink_virtio_config(struct virtio_device *vdev, u32 offset);
bool barlink_virtio_memory(struct virtio_device *vdev, u8 id, u64 *address, u64 *size);
int barlink_virtio_find_queues(struct virtio_device *vdev, void *context, struct virtqueue *queues[2]);
void barlink_virtio_delete_queues(struct virtio_device *vdev);
void barlink_virtio_ready(struct virtio_device *vdev);
int barlink_queue_add(struct virtqueue *queue, void *buffer, u32 size, bool writable);

/* In chardev.rs. */
void barlink_resumed(struct miscdevice *misc);
void barlink_identity(struct miscdevice *misc, char *name, u8 *instance);
/* In virtio.rs. */
int barlink_virtio_freeze(struct virtio_device *vdev);
int barlink_virtio_restore(struct virtio_device *vdev);
int barlink_virtio_probe(struct virtio_device *vdev);
void barlink_virtio_remove(struct virtio_device *vdev);
void barlink_virtio_doorbells_returned(void *context);
void barlink_virtio_interrupted(void *context);

static DEFINE_IDA(numbers);

int barlink_number_alloc(void)
{
	return ida_alloc(&numbers, GFP_KERNEL);
}

void barlink_number_free(int number)
{
	ida_free(&numbers, number);
}

u32 barlink_pci_address(struct device *dev)
{
	for (; dev; dev = dev->parent) {
		if (dev_is_pci(dev)) {
			struct pci_dev *pdev = to_pci_dev(dev);

			return (u32)pci_domain_nr(pdev->bus) << 16 | pci_dev_id(pdev);
		}
	}
	return 0;
}

struct device *barlink_dma_device(struct device *dev)
{
	return dev_is_pci(dev) || !dev->parent ? dev : dev->parent;
}

void barlink_flush_iommu(struct device *dev)
{
	struct iommu_domain *domain = iommu_get_domain_for_dev(dev);

	if (domain)
		iommu_flush_iotlb_all(domain);
}

/* After a hibernation the region may be that of another VM. */
static int refuse_to_hibernate(struct device *dev)
{
	return -EBUSY;
}

static int resumed(struct device *dev)
{
	barlink_resumed(dev_get_drvdata(dev));
	return 0;
}

static struct dev_pm_domain sleep = {
	.ops = {
		.freeze = pm_sleep_ptr(refuse_to_hibernate),
		.resume = pm_sleep_ptr(resumed),
	},
};

void barlink_follow_sleep(struct miscdevice *misc, bool follow)
{
	struct device *dev = misc->this_device;

	/*
	 * The kernel looks up and calls the domain under this lock. Therefore no call runs any more
	 * when the domain has been removed.
	 */
	device_lock(dev);
	dev_pm_domain_set(dev, follow ? &sleep : NULL);
	device_unlock(dev);
}

static ssize_t name_show(struct device *dev, struct device_attribute *attribute, char *text)
{
	/* The lengths are those of protocol/src/wire/identity.rs. */
	char name[64];
	u8 instance[16];

	barlink_identity(dev_get_drvdata(dev), name, instance);
	return sysfs_emit(text, "%.64s\n", name);
}
static DEVICE_ATTR_RO(name);

static ssize_t instance_show(struct device *dev, struct device_attribute *attribute, char *text)
{
	char name[64];
	u8 instance[16];

	barlink_identity(dev_get_drvdata(dev), name, instance);
	return sysfs_emit(text, "%16phN\n", instance);
}
static DEVICE_ATTR_RO(instance);

static struct attribute *identity_attrs[] = {
	&dev_attr_name.attr,
	&dev_attr_instance.attr,
	NULL,
};
ATTRIBUTE_GROUPS(identity);

const struct attribute_group **barlink_identity_attributes(void)
{
	return identity_groups;
}

void barlink_lock_init(spinlock_t *lock)
{
	spin_lock_init(lock);
}

unsigned long barlink_lock(spinlock_t *lock)
{
	unsigned long flags;

	spin_lock_irqsave(lock, flags);
	return flags;
}

void barlink_unlock(spinlock_t *lock, unsigned long flags)
{
	spin_unlock_irqrestore(lock, flags);
}

/*
 * Two functions, because each use of the macro creates a lock class, and queues of one class wake
 * queues of the other while they hold their lock.
 */
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

struct file *barlink_buffer_file(const struct file_operations *operations, void *private)
{
	return anon_inode_create_getfile("barlink-buffer", operations, private, O_RDWR, NULL);
}

static int is_file(const void *wanted, struct file *file, unsigned int descriptor)
{
	return file == wanted;
}

u32 barlink_process_with(struct file *file)
{
	struct task_struct *process, *thread;
	u32 pid = 0;

	/* A process that still has the file after a close of its copy keeps the claim. */
	task_lock(current);
	if (current->files && iterate_fd(current->files, 0, is_file, file))
		pid = task_tgid_nr(current);
	task_unlock(current);
	if (pid)
		return pid;
	rcu_read_lock();
	for_each_process_thread(process, thread) {
		/* A task that ends gives its table up under this lock, before its files are closed. */
		task_lock(thread);
		if (thread->files && iterate_fd(thread->files, 0, is_file, file))
			pid = task_tgid_nr(thread);
		task_unlock(thread);
		/* A break would end the loop over the threads of one process. */
		if (pid)
			goto found;
	}
found:
	rcu_read_unlock();
	return pid;
}

pgprot_t barlink_pgprot(u32 mode, pgprot_t prot)
{
	/* The numbers are those of CacheMode in protocol/src/wire/uapi.rs. */
	switch (mode) {
	case 3:
		return pgprot_writecombine(prot);
	case 6:
		return prot;
	default:
		return pgprot_noncached(prot);
	}
}

void __iomem *barlink_map_in_mode(u32 mode, u64 address, u64 size)
{
	/* As in barlink_pgprot. */
	switch (mode) {
	case 3:
		return ioremap_wc(address, size);
#ifdef CONFIG_X86
	case 6:
		return ioremap_cache(address, size);
#endif
	default:
		return ioremap(address, size);
	}
}

u32 barlink_granted_mode(struct vm_area_struct *vma, unsigned long address)
{
#ifdef CONFIG_X86
	/* In this order: a mode that the CPU's PAT lacks has the same bits as uncached-minus. */
	static const enum page_cache_mode modes[] = {
		_PAGE_CACHE_MODE_UC_MINUS, _PAGE_CACHE_MODE_UC, _PAGE_CACHE_MODE_WC,
		_PAGE_CACHE_MODE_WT, _PAGE_CACHE_MODE_WP, _PAGE_CACHE_MODE_WB,
	};
	struct follow_pfnmap_args args = { .vma = vma, .address = address };
	unsigned long bits;
	u32 i;

	if (follow_pfnmap_start(&args))
		return 0;
	/* The entry of a large page has the PAT bit at another place. */
	if (args.addr_mask != PAGE_MASK)
		args.pgprot = pgprot_large_2_4k(args.pgprot);
	bits = pgprot_val(args.pgprot) & _PAGE_CACHE_MASK;
	follow_pfnmap_end(&args);

	for (i = 0; i < ARRAY_SIZE(modes); i++)
		if (cachemode2protval(modes[i]) == bits)
			return i + 1;
#endif
	return 0;
}

void barlink_read_barrier(void)
{
	rmb();
}

static const struct virtio_device_id virtio_devices[] = {
	{ VIRTIO_ID_IOMEM, VIRTIO_DEV_ANY_ID },
	{},
};
MODULE_DEVICE_TABLE(virtio, virtio_devices);

static struct virtio_driver virtio_driver;

/*
 * Unbinds a device before a reset of its PCI function, which takes the queues and the region away.
 * The device stays gone until it is bound again.
 *
 * The caller holds the lock of the PCI device, but probe and removal of the virtio device hold the
 * lock of the virtio device. Therefore this takes that lock as well, in the order that
 * unregister_virtio_device uses. It waits for the lock instead of failing: virtio_pci_reset_prepare
 * cannot pass an error on, so the reset would come in the middle of a probe. The module must stay
 * loaded while this code waits.
 */
static int let_go_before_reset(struct virtio_device *vdev)
{
	int result = 0;

	if (!try_module_get(THIS_MODULE))
		return -EBUSY;
	device_lock(&vdev->dev);
	/* The caller has looked for the driver without the lock. */
	if (vdev->dev.driver == &virtio_driver.driver)
		barlink_virtio_remove(vdev);
	else
		result = -EOPNOTSUPP;
	device_unlock(&vdev->dev);
	module_put(THIS_MODULE);
	return result;
}

static struct virtio_driver virtio_driver = {
	.driver.name = "barlink",
	.id_table = virtio_devices,
	.probe = barlink_virtio_probe,
	.remove = barlink_virtio_remove,
	.freeze = pm_sleep_ptr(barlink_virtio_freeze),
	.restore = pm_sleep_ptr(barlink_virtio_restore),
	.reset_prepare = let_go_before_reset,
};

int barlink_virtio_register(void)
{
	return register_virtio_driver(&virtio_driver);
}

void barlink_virtio_unregister(void)
{
	unregister_virtio_driver(&virtio_driver);
}

struct device *barlink_virtio_dev(struct virtio_device *vdev)
{
	return &vdev->dev;
}

u32 barlink_virtio_config(struct virtio_device *vdev, u32 offset)
{
	/* A device may lack a configuration space. There is no way to ask for the length of one. */
	if (!vdev->config->get)
		return 0;
	return virtio_cread32(vdev, offset);
}

bool barlink_virtio_memory(struct virtio_device *vdev, u8 id, u64 *address, u64 *size)
{
	struct virtio_shm_region region;

	if (!virtio_get_shm_region(vdev, &region, id))
		return false;
	*address = region.addr;
	*size = region.len;
	return true;
}

static void doorbells_returned(struct virtqueue *queue)
{
	barlink_virtio_doorbells_returned(queue->vdev->priv);
}

static void interrupted(struct virtqueue *queue)
{
	barlink_virtio_interrupted(queue->vdev->priv);
}

int barlink_virtio_find_queues(struct virtio_device *vdev, void *context, struct virtqueue *queues[2])
{
	struct virtqueue_info infos[2] = {
		{ "doorbells", doorbells_returned },
		{ "interrupts", interrupted },
	};

	vdev->priv = context;
	return virtio_find_vqs(vdev, 2, queues, infos, NULL);
}

void barlink_virtio_delete_queues(struct virtio_device *vdev)
{
	vdev->config->del_vqs(vdev);
}

void barlink_virtio_ready(struct virtio_device *vdev)
{
	virtio_device_ready(vdev);
}

int barlink_queue_add(struct virtqueue *queue, void *buffer, u32 size, bool writable)
{
	struct scatterlist list;

	sg_init_one(&list, buffer, size);
	if (writable)
		return virtqueue_add_inbuf(queue, &list, 1, buffer, GFP_ATOMIC);
	return virtqueue_add_outbuf(queue, &list, 1, buffer, GFP_ATOMIC);
}
